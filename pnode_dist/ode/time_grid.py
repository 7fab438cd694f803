"""The steps between the output times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from pnode_dist.ode.time_rounding import DOUBLE, rounding_of

_MOST_LONGER = 0.1
"""By how much of itself a step may be longer than asked for where rounding makes an interval longer."""


@dataclass(frozen=True)
class TimeGrid:
    """Steps n = 0, 1, ... of size `sizes[n]` (negative when time decreases) from `starts[n]`.

    `outputs[n]` is the number of the output time that the state before step n is asked for at; the initial state is
    output 0 and the state after the last step is the one before step `steps`.
    """

    starts: tuple[float, ...]
    sizes: tuple[float, ...]
    outputs: dict[int, int]

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.starts)


def output_times(t: torch.Tensor | Sequence[float]) -> tuple[float, ...]:
    """The times at which states are asked for.

    Raises `ValueError` when `t` is not one-dimensional, finite and strictly monotone.
    """
    if isinstance(t, torch.Tensor):
        t = t.detach()
        if t.dim() != 1:
            raise ValueError(f"t must be one-dimensional, got shape {tuple(t.shape)}")
    times = tuple(float(value) for value in t)
    if not times or not all(math.isfinite(value) for value in times):
        raise ValueError(f"t must hold one or more finite times, got {list(times)}")
    direction = 0.0
    for begin, end in pairwise(times):
        span = end - begin
        if span == 0 or span * direction < 0:
            raise ValueError(f"t must increase or decrease strictly, got {begin} and then {end}")
        direction = span
    return times


def time_grid(t: torch.Tensor | Sequence[float], step_size: float | None) -> TimeGrid:
    """Divide every interval between output times into `ceil(|dt| / step_size)` equal steps, one if it is None.

    An interval that is longer than a number of steps by no more than the rounding of its ends takes that number.
    Raises what `output_times` raises, and `ValueError` when `step_size` is not positive.
    """
    times = output_times(t)
    check_step_size(step_size)
    return divided(times, step_size, rounding_of(t, times))


@lru_cache(maxsize=64)
def divided(times: tuple[float, ...], step_size: float | None, rounding: float = DOUBLE) -> TimeGrid:
    """`time_grid` of times and a size that have been checked, which carry a relative `rounding`.

    A model asks for the same few again and again.
    """
    starts: list[float] = []
    sizes: list[float] = []
    outputs = {0: 0}
    for number, (begin, end) in enumerate(pairwise(times), start=1):
        span = end - begin
        count = 1 if step_size is None else _count(begin, end, step_size, rounding)
        size = span / count
        starts.extend(begin + step * size for step in range(count))
        sizes.extend([size] * count)
        outputs[len(starts)] = number
    return TimeGrid(tuple(starts), tuple(sizes), outputs)


def _count(begin: float, end: float, step_size: float, rounding: float) -> int:
    """How many steps an interval takes.

    0.3 / 0.1 is a little over 3, and more so in a short type: a step more for the sake of rounding helps nobody.
    """
    exact = abs(end - begin) / step_size
    nearest = max(1, round(exact))
    uncertain = 4 * rounding * max(abs(begin), abs(end)) / step_size
    # Where times are hardly told apart a step is still not to be much longer than asked for.
    if exact - nearest <= max(1e-12 * exact, min(uncertain, _MOST_LONGER * nearest)):
        return nearest
    return nearest + 1


def gradient_wrt_times(
    grid: TimeGrid, times: Sequence[float], by_size: Sequence[float], by_start: Sequence[float]
) -> list[float]:
    """The derivative by each output time, from those by the sizes and starts of the steps (given as h dL/dh, dL/dt_n).

    A step keeps its place in its interval, as a fraction of it, while the ends of the interval move.
    """
    found = [0.0] * len(times)
    interval = 0
    for step, start in enumerate(grid.starts):
        begin, end = times[interval], times[interval + 1]
        span = end - begin
        along = by_size[step] / span  # dL/dh * h / span: h is a fixed share of the span
        place = (start - begin) / span
        found[interval] += (1 - place) * by_start[step] - along
        found[interval + 1] += place * by_start[step] + along
        if step + 1 in grid.outputs:
            interval = grid.outputs[step + 1]
    return found


def check_step_size(step_size: float | None) -> None:
    """Raise `ValueError` for a size that is not positive."""
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size = {step_size}: must be positive (time may decrease: its sign comes from t)")
