"""Dates of all calendars: as years, labels and encoded numbers."""

from __future__ import annotations

import cftime
import numpy as np
import pytest
import xarray

from pnode_dist.problems.common.calendar import between, calendar_of, encoded, numbers_of, time_label
from tests.unit.problems.common.files import dates, months

CALENDARS = ("noleap", "360_day", "all_leap", "julian", "standard")


@pytest.mark.parametrize("calendar", CALENDARS)
def test_a_year_is_one_year_in_every_calendar(calendar: str) -> None:
    stamps = np.array([cftime.datetime(year, 1, 1, calendar=calendar) for year in (2000, 2001, 2400)])
    years = numbers_of(stamps)
    assert years[0] == 0
    # The year 2000 has a leap day where there are any.
    assert years[1] == pytest.approx(1, abs=1 / 365 if calendar in ("julian", "standard") else 1e-12)
    assert years[2] == pytest.approx(400, rel=1e-12)


def test_the_same_month_is_another_fraction_of_a_year_where_days_are_others() -> None:
    for calendar, days, year in (("noleap", 59 + 15, 365), ("360_day", 60 + 15, 360), ("all_leap", 60 + 15, 366)):
        stamp = np.array([cftime.datetime(2000, 3, 16, calendar=calendar)])
        assert numbers_of(stamp)[0] == pytest.approx(days / year, rel=1e-12)


def test_gregorian_dates_are_the_same_years_in_either_form() -> None:
    np.testing.assert_allclose(numbers_of(dates("standard")), numbers_of(months()), rtol=1e-14)


def test_dates_and_numbers_are_told_apart_and_all_else_is_refused() -> None:
    assert calendar_of(months()) == "proleptic_gregorian"
    assert calendar_of(dates("360_day")) == "360_day"
    assert calendar_of(np.arange(3, dtype=">i2")) is None
    with pytest.raises(ValueError, match="values of type <U1"):
        calendar_of(np.array(["a"]))
    with pytest.raises(ValueError, match="dates of the calendars 360_day and noleap"):
        calendar_of(np.concatenate([dates("noleap"), dates("360_day")]))


@pytest.mark.parametrize("calendar", CALENDARS)
def test_encoded_dates_are_decoded_by_xarray(calendar: str) -> None:
    stamps = dates(calendar)
    numbers, attributes = encoded(stamps, "")
    found = xarray.decode_cf(xarray.Dataset({"t": ("t", numbers, attributes)})).t.to_numpy()
    if calendar == "standard":
        np.testing.assert_array_equal(found, months())
    else:
        np.testing.assert_array_equal(found, stamps)


def test_times_between_others_divide_the_span_evenly() -> None:
    first, last = months()[0], months()[3]
    np.testing.assert_array_equal(
        between(first, last, 2), [first + (last - first) // 3, first + (last - first) * 2 // 3]
    )
    inner = between(dates("360_day")[0], dates("360_day")[3], 2)
    np.testing.assert_array_equal(inner, dates("360_day")[1:3])
    np.testing.assert_array_equal(between(1, 4, 2), [2.0, 3.0])


@pytest.mark.parametrize("resolution", ["s", "ms", "us"])
def test_dates_that_nanoseconds_cannot_hold_are_right(resolution: str) -> None:
    stamps = np.array(["0001-01-16", "0001-02-16", "0001-03-16"], dtype=f"M8[{resolution}]")
    np.testing.assert_allclose(numbers_of(stamps), [-1998.958, -1998.873, -1998.796], atol=2e-3)
    np.testing.assert_array_equal(between(stamps[0], stamps[2], 1), stamps[0] + (stamps[2] - stamps[0]) // 2)


@pytest.mark.parametrize("stamp", [months()[1], dates("noleap")[1], np.asarray(dates("noleap")[1])])
def test_labels_show_as_much_of_a_date_as_steps_tell_apart(stamp: object) -> None:
    shown = [time_label(stamp, name) for name in ("years", "months", "days", "steps")]
    assert shown == ["2001", "2001-02", "2001-02-16", "2001-02-16T00:00"]
    assert time_label(2.5, "steps") == "2.5"
