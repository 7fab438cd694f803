"""The same field from many kinds of files: bit for bit what was put into them, or one line that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.gridded_files import GriddedChoice, open_gridded
from pnode_dist.problems.common.levels import LevelChoice
from pnode_dist.problems.field.config import FieldConfig
from pnode_dist.problems.field.data import Source, open_source
from tests.unit.problems.common import files
from tests.unit.problems.common.files import CASES, NX, NY, Case, T, count_reads, dataset, dates, months, plain, save


def source(path: Any, **keys: Any) -> Source:
    table = {"path": path, "variable": "tas", "validation": 2, "window": 2} | keys
    return open_source(FieldConfig.model_validate(table))


def whole(found: Source) -> np.ndarray[Any, Any]:
    values, _ = found.read(((0, NY), (0, NX)))
    return values


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_field_is_read_bit_for_bit_however_it_is_stored(tmp_path: Path, make: Callable[[Path], Case]) -> None:
    case = make(tmp_path)
    found = source(case.path, **case.keys)
    expected = plain() if case.expected is None else case.expected
    expected = expected if expected.ndim == 4 else expected[..., None]
    values = whole(found)
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(found.data.stamps, months() if case.stamps is None else case.stamps)
    np.testing.assert_array_equal(found.data.y.values, case.lat)
    np.testing.assert_array_equal(found.data.x.values, case.lon)


@pytest.mark.parametrize("name", ["glob", "y, x, time", "packed", "levels by value"])
def test_a_block_is_that_of_the_whole_and_no_other_value_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name](tmp_path)
    data = source(case.path, **case.keys).data
    expected = plain() if case.expected is None else case.expected
    expected = expected if expected.ndim == 4 else expected[..., None]
    read_values = count_reads(monkeypatch)
    block = data.read((1, 6), (1, 3), (2, 6))
    np.testing.assert_array_equal(block, expected[1:6, 1:3, 2:6])
    assert read_values() == block.size


def test_only_the_files_that_hold_the_times_are_opened(tmp_path: Path) -> None:
    case = CASES["glob"](tmp_path)
    data = source(case.path).data
    (tmp_path / "m_b.nc").unlink()
    np.testing.assert_array_equal(data.read((0, 5), (0, NY), (0, NX))[..., 0], plain()[:5])
    with pytest.raises(ConfigurationError, match=r"m_b\.nc"):
        data.read((0, 6), (0, NY), (0, NX))


def test_a_data_set_in_memory_is_read_like_its_file(tmp_path: Path) -> None:
    case = CASES["all levels"](tmp_path)
    choice = GriddedChoice(("tas",), level=LevelChoice(values=(500.0,)))
    with xarray.open_dataset(case.path, engine="h5netcdf") as file:
        memory = open_gridded(file.load(), choice)
    stored = open_gridded(case.path, choice)
    block = ((0, T), (1, 3), (0, 4))
    np.testing.assert_array_equal(memory.read(*block), stored.read(*block))
    assert memory.labels == stored.labels == ("tas at plev 500 hPa",)
    assert memory.units == ("K",)


def test_coordinates_beside_the_axes_are_kept(tmp_path: Path) -> None:
    data = source(CASES["curvilinear"](tmp_path).path).data
    kept = {coordinate.name: coordinate for coordinate in data.coordinates}
    assert set(kept) == {"nav_lat", "nav_lon"}
    assert kept["nav_lon"].dimensions == ("y", "x")
    np.testing.assert_array_equal(kept["nav_lon"].load()[0], files.LON)
    (tmp_path / "other").mkdir()
    height = source(CASES["bounds and scalars beside it"](tmp_path / "other").path).data.coordinates
    assert [(entry.name, float(entry.load())) for entry in height] == [("height", 2.0)]


def test_dimensions_without_coordinates_have_none_of_their_own(tmp_path: Path) -> None:
    data = source(CASES["dimensions named"](tmp_path).path, axes={"time": "b", "y": "a", "x": "c"}).data
    assert not data.y.given
    assert not data.x.given


def test_a_scalar_that_differs_between_files_is_none_of_the_whole(tmp_path: Path) -> None:
    parts = [
        save(tmp_path / f"{number}.nc", dataset().isel(time=part).assign_coords(height=2.0, run=number))
        for number, part in enumerate((slice(0, 3), slice(3, None)))
    ]
    assert [(entry.name, float(entry.load())) for entry in source(parts).data.coordinates] == [("height", 2.0)]


# What is refused


def _renamed(**names: str) -> xarray.Dataset:
    data = dataset().drop_vars(["lat", "lon"])
    return data.rename_dims(names)


def _parts(place: Path, second: xarray.Dataset, first: xarray.Dataset | None = None) -> list[str]:
    before = dataset().isel(time=slice(0, 3)) if first is None else first
    return [save(place / "a.nc", before), save(place / "b.nc", second)]


def _later(**changes: Any) -> xarray.Dataset:
    return dataset(**changes).isel(time=slice(3, None))


def _with_units(data: xarray.Dataset, **units: str) -> xarray.Dataset:
    for name, value in units.items():
        data[name].attrs["units"] = value
    return data


def _with_values(at: Any, value: float) -> xarray.Dataset:
    values = plain()
    values[at] = value
    return dataset(values)


def _raw_times(place: Path, units: str, values: Any) -> str:
    data = dataset(time=np.asarray(values))
    data.time.attrs["units"] = units
    return save(place / "a.nc", data)


REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "dimensions that say nothing": (
        lambda place: save(place / "a.nc", _renamed(lat="dim0", lon="dim1")),
        {},
        r"which of its dimensions \(time: 7, dim0: 4, dim1: 6\) is y or x: write \[problem\] axes = \{ time = ",
    ),
    "an axis that is not there": (
        lambda place: save(place / "a.nc", dataset()),
        {"axes": {"y": "j"}},
        r"axes: y = 'j': tas has no such dimension",
    ),
    "one dimension for two axes": (
        lambda place: save(place / "a.nc", dataset()),
        {"axes": {"y": "lat", "x": "lat"}},
        "axes: .* are both lat: must differ",
    ),
    "stations": (
        lambda place: save(
            place / "a.nc",
            dataset().isel(lat=0, drop=True).rename_dims(lon="s").reset_index("lon").reset_coords().set_coords("lon"),
        ),
        {},
        r"which of its dimensions \(time: 7, s: 6\) is y",
    ),
    "a trajectory": (
        lambda place: save(
            place / "a.nc",
            xarray.Dataset(
                {"tas": (("time", "s"), plain()[:, :, 0])},
                {
                    "time": months(),
                    "lat": ("s", files.LAT, {"units": "degrees_north"}),
                    "lon": ("s", files.LAT, {"units": "degrees_east"}),
                },
            ),
        ),
        {},
        "its dimension s has coordinates of y and x: must be a grid",
    ),
    "two latitudes": (
        lambda place: save(place / "a.nc", dataset().assign_coords(lon=("lon", files.LON, {"units": "degrees_north"}))),
        {},
        "its dimensions lat and lon are both y: write",
    ),
    "a repeated time": (
        lambda place: save(place / "a.nc", dataset(time=np.repeat(months(), 2)[:T])),
        {},
        "time in a.nc must increase: 2001-01-16T00:00 stands twice",
    ),
    "times out of order": (
        lambda place: save(place / "a.nc", dataset(time=months()[[0, 2, 1, 3, 4, 5, 6]])),
        {},
        "must increase: 2001-03-16T00:00 is followed by 2001-02-16T00:00",
    ),
    "a gap": (
        lambda place: save(place / "a.nc", dataset().drop_isel(time=3)),
        {},
        "missing = 'refuse': the file has no 2001-04: missing = 'mask'",
    ),
    "a gap in another calendar": (
        lambda place: save(place / "a.nc", dataset(time=dates("360_day")).drop_isel(time=[2, 3])),
        {},
        "missing = 'refuse': the file has no 2001-03, 2001-04: missing",
    ),
    "files that overlap": (
        lambda place: _parts(place, dataset().isel(time=slice(2, None))),
        {},
        r"a\.nc and b\.nc overlap: the first ends at 2001-03-16T00:00, the second begins at 2001-03-16T00:00",
    ),
    "files of other calendars": (
        lambda place: _parts(place, _later(time=dates("noleap"))),
        {},
        "differ in the calendar: proleptic_gregorian and noleap",
    ),
    "files of other units": (
        lambda place: _parts(place, _with_units(_later(), tas="degC")),
        {},
        "differ in the units of tas: 'K' and 'degC'",
    ),
    "files of other grids": (
        lambda place: _parts(place, _later().isel(lon=slice(0, 5))),
        {},
        "differ in the grid along x: 6 entries and 5",
    ),
    "files of shifted grids": (
        lambda place: _parts(place, _later().assign_coords(lat=("lat", files.LAT + 1, dataset().lat.attrs))),
        {},
        r"differ in the grid along y: -45\.0 and -44\.0 at index 0",
    ),
    "files of other variables": (
        lambda place: _parts(place, _later().rename(tas="ta")),
        {},
        r"variable = 'tas': not in the file b\.nc, which has ta",
    ),
    "a glob of nothing": (lambda place: str(place / "*.nc"), {}, r"path = '.*\*\.nc': no file matches it"),
    "a level that is not there": (
        lambda place: CASES["all levels"](place).path,
        {"level": 700},
        r"level = 700\.0: plev has 0 levels 700\.0; its levels are 850, 500, 0\.1",
    ),
    "a level index that is not there": (
        lambda place: CASES["all levels"](place).path,
        {"level": {"index": 3}},
        "must be from 0 to 2, as plev has 3",
    ),
    "levels of a field without": (
        lambda place: save(place / "a.nc", dataset()),
        {"level": 500},
        r"level: no variable has levels; the dimensions are \(time: 7, lat: 4, lon: 6\)",
    ),
    "a fill value that is not declared": (
        lambda place: save(
            place / "a.nc", _with_values((3, 1, 1), 1e20).astype(np.float32), encoding={"tas": {"_FillValue": None}}
        ),
        {},
        r"variable = 'tas': holds the value 1e\+20, which no attribute declares as missing: set its _FillValue",
    ),
    "months of no length": (
        lambda place: _raw_times(place, "months since 2001-01-01", np.arange(T) + 0.5),
        {},
        "times cannot be read: .*months since 2001-01-01",
    ),
    "dates written as numbers": (
        lambda place: _raw_times(place, "day as %Y%m%d.%f", 20010100.0 + np.arange(T)),
        {},
        "has the units 'day as %Y%m%d.%f', which tell no time",
    ),
    "text": (
        lambda place: save(place / "a.nc", dataset().astype(str)),
        {},
        "variable = 'tas': holds .*, must hold numbers",
    ),
    "a periodic boundary of half a globe": (
        lambda place: save(place / "a.nc", dataset().isel(lon=slice(0, 3))),
        {"boundary": ("replicate", "periodic")},
        "boundary: x cannot be periodic: longitudes from 0 to 120 in steps of 60 do not go round once",
    ),
    "a periodic boundary with the first meridian twice": (
        lambda place: save(
            place / "a.nc", dataset().assign_coords(lon=("lon", np.linspace(0, 360, NX), dataset().lon.attrs))
        ),
        {"boundary": ("replicate", "periodic")},
        "longitudes from 0 to 360 in steps of 72 do not go round once",
    ),
    "a periodic latitude": (
        lambda place: save(place / "a.nc", dataset()),
        {"boundary": ("periodic", "replicate")},
        "boundary: y cannot be periodic: lat is a latitude",
    ),
    "longitudes in no order": (
        lambda place: save(
            place / "a.nc", dataset().assign_coords(lon=("lon", files.LON[[0, 2, 1, 3, 4, 5]], dataset().lon.attrs))
        ),
        {},
        "the values of its axis lon must increase or decrease: 120 and 60 are side by side at index 1",
    ),
    "units that cannot be added up": (
        lambda place: CASES["two variables, one with levels"](place).path,
        {"variable": ["ps", "tas"], "normalisation": "none"},
        r"normalisation = 'none': must be 'standard' for channels in 'Pa' and 'K'",
    ),
    "two variables on other grids": (
        lambda place: save(place / "a.nc", dataset().assign(sst=(("time", "y", "x"), np.zeros((T, 2, 2))))),
        {"variable": ["tas", "sst"]},
        "sst has the dimensions .* and tas .*: must share time, y and x",
    ),
}


@pytest.mark.parametrize(("make", "keys", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_right_is_one_line(
    tmp_path: Path, make: Callable[[Path], Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        whole(source(make(tmp_path), **keys))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("[problem] ")
