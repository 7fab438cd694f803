"""The steps between the output times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from pnode_dist.ode.time_rounding import DOUBLE, rounding_of

_MOST_LONGER = 0.1
"""The largest relative excess of a step over the step size, if rounding makes an interval longer."""


@dataclass(frozen=True)
class TimeGrid:
    """The steps n = 0, 1, ... of a solve, of size `sizes[n]` (negative if time decreases) from `starts[n]`.

    `outputs[n]` is the number of the output that is the state before step n. The initial state is output 0. The state
    after the last step is the one before step `steps`.
    """

    starts: tuple[float, ...]
    sizes: tuple[float, ...]
    outputs: dict[int, int]

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.starts)


def output_times(t: torch.Tensor | Sequence[float]) -> tuple[float, ...]:
    """Return the output times as numbers.

    Raises `ValueError` if `t` is not one-dimensional, finite and strictly monotone.
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

    The rounding of the times never adds a step. Raises like `output_times`, and `ValueError` if `step_size` is not
    positive.
    """
    times = output_times(t)
    check_step_size(step_size)
    return divided(times, step_size, rounding_of(t, times))


@lru_cache(maxsize=64)
def divided(times: tuple[float, ...], step_size: float | None, rounding: float = DOUBLE) -> TimeGrid:
    """Return the `time_grid` of checked times with a relative `rounding`. Cached: a model repeats a few grids."""
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
    """Return the number of steps of an interval.

    0.3 / 0.1 is a little over 3, and more so in a short type. Such an excess from rounding adds no step.
    """
    exact = abs(end - begin) / step_size
    nearest = max(1, round(exact))
    uncertain = 4 * rounding * max(abs(begin), abs(end)) / step_size
    # Limit the excess if the times are so close that their rounding is as large as a step.
    if exact - nearest <= max(1e-12 * exact, min(uncertain, _MOST_LONGER * nearest)):
        return nearest
    return nearest + 1


def gradient_wrt_times(
    grid: TimeGrid,
    times: Sequence[float],
    by_size: Sequence[float],
    by_start: Sequence[float],
    by_observation: Mapping[int, float],
) -> list[float]:
    """Return the gradient with respect to the output times, from h dL/dh and dL/dt_n of each step.

    `by_observation` has dL/dt_n through observations of the states before some steps. Each step is a fixed share of its
    interval, and moves with the ends of the interval.
    """
    found = [0.0] * len(times)
    interval = 0
    for step, start in enumerate(grid.starts):
        begin, end = times[interval], times[interval + 1]
        span = end - begin
        along = by_size[step] / span  # dL/dh * h / span: h is a fixed share of the span
        place = (start - begin) / span
        moved = by_start[step] + by_observation.get(step, 0.0)
        found[interval] += (1 - place) * moved - along
        found[interval + 1] += place * moved + along
        if step + 1 in grid.outputs:
            interval = grid.outputs[step + 1]
    found[-1] += by_observation.get(grid.steps, 0.0)
    return found


def check_step_size(step_size: float | None) -> None:
    """Raise `ValueError` for a size that is not positive."""
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size = {step_size}: must be positive (time may decrease: its sign comes from t)")
