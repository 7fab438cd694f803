"""The time axis of a field: equal steps, equal steps with times missing, or times of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.calendar import (
    DAYS_PER_YEAR,
    YEARS,
    between,
    calendar_of,
    numbers_of,
    time_label,
)

Array = npt.NDArray[Any]
Missing = Literal["refuse", "mask"]

IRREGULARITY = 0.1
_MOST_IRREGULAR = 0.3
_NAMED = 3
_STEPS = {"hours": 1 / 24, "days": 1.0, "weeks": 7.0, "months": DAYS_PER_YEAR / 12, "years": DAYS_PER_YEAR}


@dataclass(frozen=True)
class TimeAxis:
    """When the field was taken.

    `stamps` are the times in the file (dates or numbers), `values` the same as float64: years since 2000 for dates,
    else unchanged. `step` is their mean spacing and `period` the length of the seasonal cycle, both in the units of
    `values`; `period` is None where there is no cycle. `positions` counts the times of the file, and is -1 at times
    that the file lacks. The spacing of a `regular` axis is within 10 % of `step`.
    """

    stamps: Array
    values: Array
    step: float
    period: float | None
    units: str
    positions: Array
    regular: bool

    def __len__(self) -> int:
        return len(self.values)

    @property
    def phases(self) -> Array:
        """Each time's position in the cycle, from 0 to 1; all 0 where there is no cycle."""
        return np.zeros(len(self)) if self.period is None else np.mod(self.values / self.period, 1.0)

    @property
    def seasons(self) -> Array:
        """Each time's number in a cycle of `round(period / step)` steps, such as its calendar month."""
        if self.period is None:
            return np.zeros(len(self), dtype=np.int64)
        per_cycle = max(round(self.period / self.step), 1)
        elapsed = np.rint((self.values - self.values[0]) / self.period * per_cycle)
        seasons: Array = np.mod(elapsed.astype(np.int64), per_cycle)
        return seasons

    @property
    def interval(self) -> float:
        """The time between two outputs of a solve: `step`, or the longest spacing of an irregular axis."""
        return self.step if self.regular else float(np.diff(self.values).max())

    @property
    def step_name(self) -> str:
        """The name of a step in the plural: months, days, ..., or steps where it is nothing of the kind."""
        days = self.step * DAYS_PER_YEAR if self.units == YEARS and self.regular else 0.0
        return next((name for name, length in _STEPS.items() if abs(days / length - 1) < IRREGULARITY), "steps")

    def label(self, index: int) -> str:
        """A time for people: as much of the date as the steps tell apart, or the number."""
        return time_label(self.stamps[index], self.step_name)


def time_axis(stamps: Array, units: str, period: float | None, missing: Missing, about: str) -> TimeAxis:
    """The axis of the increasing times `stamps`, with missing times put in where equal steps show that they are.

    Raises `ConfigurationError` for fewer than two times, a period of less than two steps, and, with
    `missing="refuse"`, for missing times.
    """
    values = numbers_of(stamps)
    if len(values) < 2:
        raise ConfigurationError(f"{about} has {len(values)} time: must have two or more")
    is_dated = calendar_of(stamps) is not None
    units = YEARS if is_dated else units
    positions = np.arange(len(values))
    counts = _whole_steps(values)
    regular = counts is not None
    if counts is not None and (counts > 1).any():
        stamps, positions = _completed(stamps, counts)
        values = numbers_of(stamps)
    step = float(values[-1] - values[0]) / (len(values) - 1)
    if period is None and is_dated and 2 * step <= 1.0:
        # Means of a year or longer have no seasons.
        period = 1.0
    if period is not None and period < 2 * step:
        raise ConfigurationError(
            f"[problem] period = {period:g}: must be two steps of the time axis, {2 * step:.4g}, or more"
        )
    axis = TimeAxis(stamps, values, step, period, units, positions, regular)
    lacking = np.flatnonzero(positions < 0)
    if len(lacking) and missing == "refuse":
        raise missing_times(axis, lacking, "the file has no")
    return axis


def missing_times(axis: TimeAxis, lacking: Array, reason: str) -> ConfigurationError:
    """The error that names the times number `lacking`."""
    named = ", ".join(axis.label(int(number)) for number in lacking[:_NAMED])
    more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
    return ConfigurationError(
        f"[problem] missing = 'refuse': {reason} {named}{more}: missing = 'mask' leaves such times out of loss and "
        "figures"
    )


def _whole_steps(values: Array) -> Array | None:
    """Return each spacing as a number of equal steps, or None if there is no such step."""
    spacing = np.diff(values)
    step = float(np.median(spacing))
    for _ in range(2):
        counts = np.maximum(np.rint(spacing / step), 1)
        step = float(values[-1] - values[0]) / float(counts.sum())
    allowed = np.minimum(IRREGULARITY * counts, _MOST_IRREGULAR) * step
    if (counts == 1).sum() * 2 < len(counts) or (np.abs(spacing - counts * step) > allowed).any():
        return None
    return np.asarray(counts.astype(np.int64))


def _completed(stamps: Array, counts: Array) -> tuple[Array, Array]:
    """The times with those that are missing, and the position of each in `stamps` or -1."""
    parts: list[Array] = [stamps[:1]]
    positions = [0]
    for number, count in enumerate(counts, start=1):
        if count > 1:
            parts.append(between(stamps[number - 1], stamps[number], int(count) - 1))
            positions += [-1] * (int(count) - 1)
        parts.append(stamps[number : number + 1])
        positions.append(number)
    return np.concatenate(parts), np.array(positions)
