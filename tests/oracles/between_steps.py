"""A solve whose state is replaced by a map of it after each step, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

Step = Callable[[torch.Tensor, Any, torch.Tensor], Any]
"""The state after a step from a time and a state by a size."""


def in_equal_steps(t: torch.Tensor, step_size: float) -> list[list[torch.Tensor]]:
    """The times at the ends of equal steps of about `step_size` in each interval, first and last included."""
    found = []
    for begin, end in pairwise(t):
        count = max(1, round(abs(float((end - begin).detach())) / step_size))
        found.append([*(begin + number * (end - begin) / count for number in range(count)), end])
    return found


def mapped_solve(
    step: Step, between: Callable[[torch.Tensor, Any], Any], u0: Any, intervals: Sequence[Sequence[torch.Tensor]]
) -> list[Any]:
    """The states at the beginning and at the ends of the intervals, each a sequence of times of steps."""
    state, outputs = u0, [u0]
    for times in intervals:
        for begin, end in pairwise(times):
            state = between(end, step(begin, state, end - begin))
        outputs.append(state)
    return outputs
