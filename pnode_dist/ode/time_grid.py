"""The steps between the output times."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from pnode_dist.ode.jumps import SmoothInterval
from pnode_dist.ode.time_rounding import DOUBLE, rounding_of

_MOST_LONGER = 0.1
"""The largest relative excess of a step over the step size, if rounding makes an interval longer."""


@dataclass(frozen=True)
class TimeGrid:
    """The steps n = 0, 1, ... of a solve, of size `sizes[n]` (negative if time decreases) from `starts[n]`.

    `outputs[n]` is the number of the output that is the state before step n. The initial state is output 0. The state
    after the last step is the one before step `steps`. `jumps[n]` is the time of a jump of f before step n. `end` is
    the time after the last step, None if it is not known better than from the size of that step.
    """

    starts: tuple[float, ...]
    sizes: tuple[float, ...]
    outputs: dict[int, int]
    jumps: dict[int, float] = field(default_factory=dict)
    end: float | None = None

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.starts)

    def smooth_interval(self, step: int) -> SmoothInterval | None:
        """Return the interval between jumps that contains a step; None without jumps."""
        if not self.jumps:
            return None
        numbers, intervals = self._smooth_intervals
        return intervals[bisect_right(numbers, step)]

    @cached_property
    def _smooth_intervals(self) -> tuple[list[int], list[SmoothInterval]]:
        """The steps that begin at a jump, and the intervals before, between and after the jumps."""
        return list(self.jumps), SmoothInterval.between_all(tuple(self.jumps.values()), self.sizes[0])


class Stop(NamedTuple):
    """A time at which a step ends: `output` is the number of the output there, or None. `is_jump`: f jumps there.

    `after` is the interval between jumps that contains the next step; None without jumps.
    """

    time: float
    output: int | None
    is_jump: bool
    after: SmoothInterval | None


def stops_of(times: Sequence[float], jumps: Sequence[float]) -> list[Stop]:
    """Return the output times and the jumps between the first and the last of them, in the order of the steps."""
    low, high = sorted((times[0], times[-1]))
    backward = times[-1] < times[0]
    met = sorted((time for time in jumps if low <= time <= high), reverse=backward)
    numbers = {time: number for number, time in enumerate(times)}
    intervals = SmoothInterval.between_all(met, times[-1] - times[0]) if met else [None]
    found, passed = [], 0
    for time in sorted({*met, *numbers}, reverse=backward):
        is_jump = passed < len(met) and met[passed] == time
        passed += is_jump
        found.append(Stop(time, numbers.get(time), is_jump, intervals[passed]))
    return found


def output_times(t: torch.Tensor | Sequence[float]) -> tuple[float, ...]:
    """Return the output times as numbers.

    Raises `ValueError` if `t` is not one-dimensional, finite and strictly monotone.
    """
    if isinstance(t, torch.Tensor):
        t = t.detach()
        if t.dim() != 1:
            hint = " (pnode_dist.odeint_spans takes times for each sample)" if t.dim() == 2 else ""
            raise ValueError(f"t must be one-dimensional, got shape {tuple(t.shape)}{hint}")
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
def divided(
    times: tuple[float, ...], step_size: float | None, rounding: float = DOUBLE, jumps: tuple[float, ...] = ()
) -> TimeGrid:
    """Return the `time_grid` of checked times with a relative `rounding`. Cached: a model repeats a few grids.

    A step also ends at each of the times `jumps` between them, which thus divide intervals into shorter ones.
    """
    starts: list[float] = []
    sizes: list[float] = []
    outputs: dict[int, int] = {}
    met: dict[int, float] = {}
    begin = times[0]
    for end, output, is_jump, _ in stops_of(times, jumps):
        span = end - begin
        if span:
            count = 1 if step_size is None else _count(begin, end, step_size, rounding)
            size = span / count
            starts.extend(begin + step * size for step in range(count))
            sizes.extend([size] * count)
        if output is not None:
            outputs[len(starts)] = output
        if is_jump:
            met[len(starts)] = end
        begin = end
    return TimeGrid(tuple(starts), tuple(sizes), outputs, met, times[-1])


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
    interval, and moves with the ends of the interval. An end that is a jump and no output does not move.
    """
    found = [0.0] * len(times)
    ends = {step: times[output] for step, output in grid.outputs.items()}
    for first, last in pairwise(sorted({**grid.jumps, **ends})):
        begin, end = (ends[step] if step in ends else grid.jumps[step] for step in (first, last))
        span = end - begin
        for step in range(first, last):
            along = by_size[step] / span  # dL/dh * h / span: h is a fixed share of the span
            place = (grid.starts[step] - begin) / span
            moved = by_start[step] + by_observation.get(step, 0.0)
            if first in ends:
                found[grid.outputs[first]] += (1 - place) * moved - along
            if last in ends:
                found[grid.outputs[last]] += place * moved + along
    found[-1] += by_observation.get(grid.steps, 0.0)
    return found


def check_step_size(step_size: float | None) -> None:
    """Raise `ValueError` for a size that is not positive."""
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size = {step_size}: must be positive (time may decrease: its sign comes from t)")
