"""Time axes: equal steps, missing times, and times of their own."""

from __future__ import annotations

from typing import Any

import cftime
import numpy as np
import pytest

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.time_axis import Missing, TimeAxis, time_axis


def axis(stamps: Any, period: float | None = None, missing: Missing = "mask") -> TimeAxis:
    return time_axis(np.asarray(stamps), "", period, missing, "the axis")


def months(count: int, calendar: str = "noleap", day: int = 16) -> list[cftime.datetime]:
    return [cftime.datetime(1999 + n // 12, n % 12 + 1, day, calendar=calendar) for n in range(count)]


@pytest.mark.parametrize("calendar", ["noleap", "360_day", "all_leap", "standard", "julian"])
@pytest.mark.parametrize("day", [1, 16, 28])
def test_months_of_every_calendar_are_regular_steps_of_a_year(calendar: str, day: int) -> None:
    found = axis(months(40, calendar, day))
    assert found.regular
    assert found.step_name == "months"
    assert found.period == 1.0
    np.testing.assert_array_equal(found.seasons, np.arange(40) % 12)
    assert found.label(13) == "2000-02"
    assert found.interval == found.step


@pytest.mark.parametrize("gone", [[5], [5, 6], [3, 20, 21], list(range(10, 23))], ids=str)
@pytest.mark.parametrize("calendar", ["noleap", "standard", "360_day"])
def test_missing_months_are_put_in_and_counted_as_missing(gone: list[int], calendar: str) -> None:
    whole = months(36, calendar)
    found = axis([stamp for number, stamp in enumerate(whole) if number not in gone])
    assert found.regular
    assert len(found) == 36
    np.testing.assert_array_equal(np.flatnonzero(found.positions < 0), gone)
    assert [found.label(number) for number in range(36)] == [stamp.strftime("%Y-%m") for stamp in whole]


def test_missing_times_are_refused_by_date() -> None:
    stamps = [stamp for number, stamp in enumerate(months(36)) if number not in (4, 9, 10, 11, 30)]
    with pytest.raises(ConfigurationError, match="'refuse': the file has no 1999-05, 1999-10, 1999-11 and 2 more: "):
        axis(stamps, missing="refuse")


def test_irregular_times_stay_as_they_are() -> None:
    stamps = np.array([0, 1, 2.5, 2.7, 6, 7, 7.1])
    found = axis(stamps, missing="refuse")
    assert not found.regular
    np.testing.assert_array_equal(found.values, stamps)
    np.testing.assert_array_equal(found.positions, np.arange(7))
    assert found.interval == pytest.approx(3.3)
    assert found.step_name == "steps"


def test_means_of_years_have_no_cycle_unless_one_is_configured() -> None:
    stamps = [cftime.datetime(1900 + n, 7, 1, calendar="360_day") for n in range(20)]
    assert axis(stamps).period is None
    assert axis(stamps, period=11.0).period == 11.0
    with pytest.raises(ConfigurationError, match=r"period = 1\.5: must be two steps of the time axis, 2, or more"):
        axis(stamps, period=1.5)


def test_one_time_is_too_few() -> None:
    with pytest.raises(ConfigurationError, match="the axis has 1 time: must have two or more"):
        axis([3.0])
