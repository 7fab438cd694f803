"""The pieces of a solve with error control: from jump to jump of f, with the times at which steps have to end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from pnode_dist.torchdiffeq.options import AdaptiveOptions


@dataclass(frozen=True)
class Piece:
    """A part of a solve without a jump inside.

    `times` are the times at which steps end, from the first to the last one. `wanted` are the numbers of those that are
    outputs. `from_jump`, `to_jump`: f jumps at the first or the last time.
    """

    times: torch.Tensor
    wanted: list[int]
    from_jump: bool
    to_jump: bool


def pieces(t: torch.Tensor, options: AdaptiveOptions) -> list[Piece]:
    """Divide a solve at the jumps between `t[0]` and `t[-1]`. The first time of a later piece is no output."""
    inside = _inside(t, options.jump_t)
    stops = {*_inside(t, options.step_t), *inside}
    known = t.detach().tolist()
    added = sorted(stops - set(known))
    if not added and not inside:
        return [Piece(t, list(range(len(t))), False, False)]
    times = torch.cat([t.to(torch.float64), torch.tensor(added, dtype=torch.float64, device=t.device)])
    order = torch.argsort(times.detach(), descending=known[-1] < known[0])
    times = times[order]
    outputs = {number for number, index in enumerate(order.tolist()) if index < len(known)}
    values = times.detach().tolist()
    ends = [0, *(number for number, value in enumerate(values) if value in inside), len(values) - 1]
    return [
        Piece(
            times[begin : end + 1],
            [number - begin for number in range(begin if begin == 0 else begin + 1, end + 1) if number in outputs],
            begin != 0,
            end != len(values) - 1,
        )
        for begin, end in pairwise(ends)
    ]


def _inside(t: torch.Tensor, times: tuple[float, ...]) -> set[float]:
    least, most = sorted((t[0].item(), t[-1].item()))
    return {time for time in times if least < time < most}


def within(func: Callable[..., Any], piece: Piece) -> Callable[..., Any]:
    """Return func without its values at jumps: there the time is the nearest one inside the piece, in func's type."""
    if not (piece.from_jump or piece.to_jump):
        return func
    first, last = piece.times[0].item(), piece.times[-1].item()
    bounded = {first: piece.from_jump, last: piece.to_jump}
    least, most = sorted(bounded)
    lower = least if bounded[least] else -math.inf
    upper = most if bounded[most] else math.inf

    def inside(t: torch.Tensor, y: Any) -> Any:
        value = t.detach()
        low, high = torch.full_like(value, lower), torch.full_like(value, upper)
        moved = value.clamp(torch.nextafter(low, high), torch.nextafter(high, low))
        # The derivative with respect to t is that of func also where the time is moved.
        return func(moved + (t - value), y)

    return inside
