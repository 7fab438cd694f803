"""Dates of all CF calendars: as years, as labels and as encoded numbers.

Dates of the Gregorian calendar are datetime64, those of other calendars cftime objects, as xarray decodes them.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pnode_dist.errors import ConfigurationError

try:
    import cftime
except ModuleNotFoundError:
    raise ConfigurationError("dates of all calendars need cftime: pip install 'pnode-dist[data]'") from None

Array = npt.NDArray[Any]

DAYS_PER_YEAR = 365.2425
GREGORIAN = "proleptic_gregorian"
YEARS = "years since 2000-01-01"
_EPOCH = np.datetime64("2000-01-01T00:00:00", "ns")
_SECONDS = "seconds since 1970-01-01 00:00:00"
_DAYS = {"noleap": 365.0, "365_day": 365.0, "all_leap": 366.0, "366_day": 366.0, "360_day": 360.0, "julian": 365.25}
_SHOWN: dict[str, Literal["Y", "M", "D", "m"]] = {"years": "Y", "months": "M", "weeks": "D", "days": "D"}
_FORMATS = {"Y": "%Y", "M": "%Y-%m", "D": "%Y-%m-%d", "m": "%Y-%m-%dT%H:%M"}


def calendar_of(stamps: Array) -> str | None:
    """The calendar of dates, or None for numbers.

    Raises `ValueError` for anything that is neither.
    """
    if stamps.dtype.kind == "M":
        return GREGORIAN
    if stamps.dtype.kind in "fiu":
        return None
    if stamps.dtype.kind == "O" and stamps.size and all(isinstance(stamp, cftime.datetime) for stamp in stamps.flat):
        calendars = sorted({str(stamp.calendar) for stamp in stamps.flat})
        if len(calendars) == 1 and calendars[0]:
            return calendars[0]
        raise ValueError(f"dates of the calendars {' and '.join(calendars)}")
    raise ValueError(f"values of type {stamps.dtype}")


def days_per_year(calendar: str) -> float:
    """The mean length of a calendar's year in days."""
    return _DAYS.get(calendar, DAYS_PER_YEAR)


def numbers_of(stamps: Array) -> Array:
    """Dates as float64 years since the beginning of 2000 in their own calendar, and numbers as float64."""
    calendar = calendar_of(stamps)
    if calendar is None:
        return stamps.astype(np.float64)
    if calendar == GREGORIAN and stamps.dtype.kind == "M":
        # In the stamps' own resolution: in nanoseconds, dates before 1678 would overflow without a word.
        elapsed = (stamps - _EPOCH.astype(stamps.dtype)) / np.timedelta64(1, "s")
    else:
        elapsed = np.asarray(cftime.date2num(stamps, "seconds since 2000-01-01", calendar), dtype=np.float64)
    years: Array = elapsed / (86400 * days_per_year(calendar))
    return years


def between(first: Any, last: Any, count: int) -> Array:
    """`count` times that divide the span from `first` to `last` evenly, both ends left out."""
    span = last - first
    if isinstance(first, cftime.datetime):
        inner = [first + span * number / (count + 1) for number in range(1, count + 1)]
        return np.array(inner, dtype=object)
    if isinstance(first, np.datetime64):
        unit = "ns" if first.dtype == np.dtype("M8[ns]") else "us"
        whole = int(span.astype(f"m8[{unit}]").astype(np.int64))
        steps = np.array([whole * number // (count + 1) for number in range(1, count + 1)])
        return np.asarray(first + steps.astype(f"m8[{unit}]"))
    return np.asarray(float(first) + float(span) * np.arange(1, count + 1) / (count + 1))


def time_label(stamp: Any, step_name: str) -> str:
    """`2009-10` for steps that are months, `2009-10-16` for days, with the hour for shorter ones; or the number."""
    unit = _SHOWN.get(step_name, "m")
    value = np.asarray(stamp)
    if value.dtype.kind == "M":
        return str(np.datetime_as_string(value, unit=unit))
    if value.dtype.kind == "O":
        return str(value.item().strftime(_FORMATS[unit]))
    return f"{float(stamp):g}"


def encoded(stamps: Array, units: str) -> tuple[Array, dict[str, Any]]:
    """Times by the CF conventions: dates as seconds since 1970 in their calendar, numbers as they are with `units`."""
    if stamps.dtype.kind == "M":
        return stamps.astype("datetime64[s]").astype(np.int64), {"units": _SECONDS, "calendar": GREGORIAN}
    if stamps.dtype.kind == "O":
        calendar = stamps.flat[0].calendar
        seconds = np.asarray(cftime.date2num(stamps, _SECONDS, calendar))
        return np.rint(seconds).astype(np.int64), {"units": _SECONDS, "calendar": str(calendar)}
    return stamps, {"units": units}
