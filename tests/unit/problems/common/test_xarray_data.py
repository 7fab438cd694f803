"""Forecasts of xarray objects: the same numbers as plain arrays, whatever the order of axes and the calendar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from pnode_dist import ConfigurationError, GridPartition, Mesh, TrajectoryData
from tests.unit.problems.common.test_forecast_problem import Vector, built

TIMES, ROWS, COLUMNS = 10, 4, 5
LATITUDE = np.linspace(60.0, -60.0, ROWS)
LONGITUDE = np.linspace(0.0, 288.0, COLUMNS)


def values(channels: int = 1) -> np.ndarray:
    """A field that decays, `[time, y, x, channel]`."""
    start = np.random.default_rng(0).normal(280.0, 5.0, (ROWS, COLUMNS, channels))
    return start * np.exp(-0.1 * np.arange(TIMES))[:, None, None, None]


def dataset(order: tuple[str, ...], dates: Any, names: tuple[str, ...] = ("tas",)) -> xarray.Dataset:
    """The field as a data set with CF attributes, its axes in some order."""
    field = values(len(names))
    variables = {
        name: (("time", "lat", "lon"), field[..., number], {"units": "K"}) for number, name in enumerate(names)
    }
    coordinates = {
        "time": dates,
        "lat": ("lat", LATITUDE, {"units": "degrees_north"}),
        "lon": ("lon", LONGITUDE, {"units": "degrees_east"}),
    }
    return xarray.Dataset(variables, coordinates).transpose(*order)


DATES = {
    "gregorian": np.datetime64("2001-01-01") + 30 * np.arange(TIMES) * np.timedelta64(1, "D"),
    "360_day": xarray.date_range("2001-01-01", periods=TIMES, freq="30D", calendar="360_day", use_cftime=True),
}


def problem_of(data: Any, channels: int = 1) -> type[Vector]:
    """A problem of these data on a grid."""

    class Own(Vector):
        def build_partition(self) -> Any:
            return GridPartition(self.mesh, (ROWS, COLUMNS), channels)

        def load_data(self) -> Any:
            return data

    return Own


@pytest.mark.parametrize("calendar", DATES)
@pytest.mark.parametrize("order", [("time", "lat", "lon"), ("lat", "lon", "time"), ("lon", "time", "lat")])
def test_a_data_set_is_read_as_the_array_in_it(order: tuple[str, ...], calendar: str, mesh: Mesh) -> None:
    read = built(problem_of(dataset(order, DATES[calendar])), mesh, problem={"type": "own", "validation": 3})
    plain = built(problem_of(TrajectoryData(values())), mesh, problem={"type": "own", "validation": 3})
    assert torch.equal(read.samples.values, plain.samples.values)
    assert read.samples.is_regular
    days = 360.0 if calendar == "360_day" else 365.2425
    assert read.samples.times.diff().tolist() == pytest.approx([30 / days] * 6)
    assert read.units == "K"


def test_variables_become_channels_and_the_file_has_the_coordinates(mesh: Mesh, tmp_path: Path) -> None:
    data = dataset(("lat", "time", "lon"), DATES["gregorian"], ("tas", "tos"))
    problem = built(problem_of(data, 2), mesh, problem={"type": "own", "validation": 3}, evaluation={"leads": [1, 2]})
    with torch.no_grad():
        result = problem.evaluate(problem.model, tmp_path)
    with xarray.open_dataset(result["forecast"], engine="h5netcdf") as file:
        assert file["truth"].dims == ("start", "lead", "lat", "lon", "channel")
        assert file["lat"].to_numpy().tolist() == LATITUDE.tolist()
        assert file["lat"].attrs["units"] == "degrees_north"
        assert [str(name) for name in file["channel"].to_numpy()] == ["tas", "tos"]
        expected = values(2)[6:9].astype(np.float32)
        assert np.array_equal(file["truth"][0].to_numpy(), expected)
        assert str(file["start_label"][0].item()) == "2001-06-30"
        assert file["time"][0, 1].to_numpy() == DATES["gregorian"][7]


def test_a_month_that_is_missing_is_refused_by_its_date(mesh: Mesh) -> None:
    data = dataset(("time", "lat", "lon"), DATES["gregorian"]).load()
    data["tas"][2] = np.nan
    with pytest.raises(ConfigurationError, match=r"20 values are not finite, .* at time 2 \(2001-03-02\)"):
        built(problem_of(data), mesh, problem={"type": "own"})
    masked = built(problem_of(data), mesh, problem={"type": "own", "missing": "mask"})
    assert 2 not in [first for _, first in masked.samples.starts(1)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (dataset(("time", "lat", "lon"), DATES["gregorian"]).isel(lon=slice(4)), r"4 x 4 points and 1 channel"),
        (xarray.Dataset({"a": (("p", "q", "r"), np.ones((3, 4, 5)))}), r"nothing says which of its dimensions"),
        (xarray.Dataset({"a": 1.0}), r"no variable of two or more dimensions"),
    ],
)
def test_data_that_do_not_fit_are_one_clear_line(data: xarray.Dataset, expected: str, mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        built(problem_of(data), mesh, problem={"type": "own"})
