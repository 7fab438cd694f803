"""Symplectic steps in plain torch, from their definitions: Verlet's method, and compositions of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from tests.oracles.runge_kutta import steps_between

Pair = tuple[torch.Tensor, torch.Tensor]
Rate = Callable[..., torch.Tensor]
Step = Callable[[Rate, Rate, Any, Any, Pair], Pair]


def verlet(v: Rate, a: Rate, time: Any, size: Any, state: Pair) -> Pair:
    """Half a kick, a drift, half a kick: v(t, p) is dq/dt at the middle of the step, a(t, q) is dp/dt at its ends."""
    q, p = state
    p = p + size / 2 * a(time, q)
    q = q + size * v(time + size / 2, p)
    return q, p + size / 2 * a(time + size, q)


def triple_jump(v: Rate, a: Rate, time: Any, size: Any, state: Pair) -> Pair:
    """Yoshida 1990, eq. (2.11): a step of order 4 of three of Verlet's."""
    root = 2.0 ** (1 / 3)
    for share in (1 / (2 - root), -root / (2 - root), 1 / (2 - root)):
        state = verlet(v, a, time, share * size, state)
        time = time + share * size
    return state


# Solution A of Yoshida 1990, table 1, with the digits there; w_0 makes the sum 1.
_W = (0.235573213359357, 0.784513610477560, -1.17767998417887)


def sixth(v: Rate, a: Rate, time: Any, size: Any, state: Pair) -> Pair:
    """Yoshida 1990, eq. (3.8): a step of order 6 of seven of Verlet's."""
    w2, w3, w1 = _W
    for share in (w3, w2, w1, 1 - 2 * (w1 + w2 + w3), w1, w2, w3):
        state = verlet(v, a, time, share * size, state)
        time = time + share * size
    return state


STEPS: dict[str, Step] = {"leapfrog": verlet, "yoshida4": triple_jump, "yoshida6": sixth}


def odeint_symplectic(
    v: Rate, a: Rate, u0: Pair, t: Sequence[float] | torch.Tensor, step: Step, step_size: float | None = None
) -> Pair:
    """The states at the times `t`, a stack for each part. With a tensor of times each interval is one step."""
    states, state = [u0], u0
    if isinstance(t, torch.Tensor):
        for begin, end in pairwise(t):
            state = step(v, a, begin, end - begin, state)
            states.append(state)
    else:
        for begin, end in pairwise(t):
            for start, size in steps_between(begin, end, step_size):
                state = step(v, a, torch.tensor(start, dtype=u0[0].dtype), size, state)
            states.append(state)
    q, p = (torch.stack(parts) for parts in zip(*states, strict=True))
    return q, p
