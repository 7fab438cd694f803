"""Fields with missing values, irregular times, several variables and curvilinear grids, from file to forecast."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from matplotlib import image

from pnode_dist import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.field.model import SeasonalCycle, windows
from pnode_dist.problems.field.problem import FieldProblem, baselines, build_field
from pnode_dist.verify.gradcheck import gradcheck
from tests.unit.problems.field.plain_field import PlainField, fractions_of_year
from tests.unit.problems.field.synthetic_fields import (
    NX,
    NY,
    TIMES,
    VALIDATION,
    config,
    dataset,
    land,
    months,
    values,
    write,
)

TRAINING = TIMES - VALIDATION
GONE, EMPTY, LATE = 7, 12, TRAINING + 1


def holed() -> np.ndarray[Any, Any]:
    """The field without the months `GONE`, `EMPTY` and, in the validation part, `LATE`; NaN on land."""
    field = np.where(land(), np.nan, values())
    field[[GONE, EMPTY, LATE]] = np.nan
    return np.asarray(field)


def usual_months(field: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The mean of each calendar month over the training part, NaN on land."""
    means = np.full((12, NY, NX), np.nan)
    for season in range(12):
        means[season, ~land()] = np.nanmean(field[season:TRAINING:12, ~land()], axis=0)
    return means


def with_holes() -> xarray.Dataset:
    """One month is not in the file, two are in it without values."""
    return dataset(holed(), masked=False).drop_isel(time=GONE)


def build(directory: Path, mesh: Mesh, data: xarray.Dataset, **tables: Any) -> FieldProblem:
    problem = {"missing": "mask"} | tables.pop("problem", {})
    return build_field(config(write(directory / "f.nc", data), problem=problem, **tables), mesh, torch.float64)


def parameters(problem: FieldProblem) -> dict[str, torch.Tensor]:
    return {name.removeprefix("solve.func."): value for name, value in problem.model.named_parameters()}


def plain(problem: FieldProblem, field: np.ndarray[Any, Any]) -> PlainField:
    return PlainField(field[..., None], problem.field.time.phases, problem.field.time.step, 1.0, (False, True))


# Missing values


def test_missing_months_count_neither_in_the_moments_nor_in_the_loss(tmp_path: Path, mesh: Mesh) -> None:
    problem = build(tmp_path, mesh, with_holes())
    whole = plain(problem, holed())
    assert len(problem.field.time) == TIMES
    np.testing.assert_allclose(problem.field.time.phases, fractions_of_year(months()), atol=2e-3)
    for found, expected in zip((problem.field.mean, problem.field.deviation), whole.moments(), strict=True):
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-13, atol=0)
    starts = [4, 5, 17]
    loss = problem.loss(problem.model, windows(problem.field, starts, 3, torch.float64))
    loss.backward()  # type: ignore[no-untyped-call]
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters(problem).items()}
    expected_loss = whole.loss(leaves, 2, starts, 3, 2)
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-11)
    for name, value in parameters(problem).items():
        torch.testing.assert_close(value.grad, leaves[name].grad, rtol=1e-9, atol=1e-12)


def test_no_window_starts_at_a_missing_month(tmp_path: Path, mesh: Mesh) -> None:
    problem = build(tmp_path, mesh, with_holes())
    starts = sorted(start for batch in problem.batches(1) for start in batch.starts)
    assert starts == [start for start in range(TRAINING - 3) if start not in (GONE, EMPTY)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_holes, "missing = 'refuse': the file has no 2001-08: missing = 'mask' leaves such times out"),
        (
            lambda: dataset(holed(), masked=False),
            "missing = 'refuse': all values are missing at 2001-08, 2002-01, 2003-02: missing = 'mask'",
        ),
    ],
    ids=["not in the file", "without values"],
)
def test_missing_months_are_refused_by_date(tmp_path: Path, mesh: Mesh, data: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(tmp_path, mesh, data(), problem={"missing": "refuse"})


def test_figures_and_baselines_leave_missing_months_out(tmp_path: Path, mesh: Mesh) -> None:
    problem = build(tmp_path, mesh, with_holes())
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
        figures = problem.validation(problem.model)
    assert table["missing"] == "3 of 30 times, and 0 single values at others"
    data = xarray.open_dataset(tmp_path / "forecast.h5", engine="h5netcdf")
    starts = [start for start in range(TRAINING - 1, TIMES - 3) if start != LATE]
    np.testing.assert_array_equal(
        data.start.to_numpy().astype("M8[s]"), problem.field.time.stamps[starts].astype("M8[s]")
    )
    field = holed()
    truth = np.stack([field[[start + lead for lead in (1, 2, 3)]] for start in starts])
    np.testing.assert_allclose(data.truth, truth, rtol=1e-6)
    usual = usual_months(field)
    for number, row in enumerate(table["rmse"]):
        later = [start + number + 1 for start in starts]
        for name, forecast in (
            ("model", data.forecast[:, number].to_numpy().astype(float)),
            ("persistence", field[starts]),
            ("climatology", usual[[time % 12 for time in later]]),
        ):
            error = math.sqrt(np.nanmean((forecast - field[later]) ** 2))
            assert row[name] == pytest.approx(error, rel=1e-4 if name == "model" else 1e-11), name
    error = math.sqrt(np.nanmean((data.forecast.to_numpy().astype(float) - truth) ** 2))
    assert figures["validation_rmse"] == pytest.approx(error, rel=1e-4)
    assert image.imread(tmp_path / "report.png").shape[0] > 1000


def test_single_missing_values_are_masked_and_the_cycle_is_fitted_to_the_others(tmp_path: Path, mesh: Mesh) -> None:
    generator = np.random.default_rng(3)
    field = np.where(land(), np.nan, values())
    field[2:20:3][generator.random((6, NY, NX)) < 0.2] = np.nan
    problem = build(tmp_path, mesh, dataset(field, masked=False))
    assert problem.field.cells == int((~land()).sum())
    cycle = SeasonalCycle(problem.field, 2)
    phases = fractions_of_year(months())[:TRAINING]
    angle = 2 * np.pi * np.outer(phases, [1, 2])
    design = np.hstack([np.ones((TRAINING, 1)), np.cos(angle), np.sin(angle)])
    mean, deviation = (float(value) for value in (problem.field.mean, problem.field.deviation))
    for y, x in zip(*np.nonzero(~land()), strict=True):
        there = ~np.isnan(field[:TRAINING, y, x])
        wanted = np.linalg.lstsq(design[there], (field[:TRAINING, y, x][there] - mean) / deviation, rcond=None)[0]
        np.testing.assert_allclose(cycle.coefficients[:, y, x, 0], wanted, rtol=1e-8, atol=1e-9)
    batch = windows(problem.field, [1], 3, torch.float64)
    assert batch.present is not None
    np.testing.assert_array_equal(batch.present[..., 0].numpy()[:, 0] == 1, ~np.isnan(field[2:5]))
    missing = np.isnan(field[:TRAINING]).any(axis=(1, 2)) & ~np.isnan(field[:TRAINING]).all(axis=(1, 2))
    starts = {start for epoch in problem.batches(1) for start in epoch.starts}
    assert starts.isdisjoint(np.flatnonzero(np.isnan(field[:, ~land()]).any(axis=1)))
    assert missing.any()


def test_the_damping_comes_from_pairs_that_are_both_there(tmp_path: Path, mesh: Mesh) -> None:
    problem = build(tmp_path, mesh, with_holes())
    field = holed()
    usual = usual_months(field)
    departures = field[:TRAINING] - usual[np.arange(TRAINING) % 12]
    pairs = departures[:-1] * departures[1:]
    correlation = np.nansum(pairs) / np.nansum(np.where(np.isnan(pairs), np.nan, departures[:-1] ** 2))
    start = TRAINING - 1
    batch = windows(problem.field, [start], 2, torch.float64)
    forecast = baselines(problem.field, batch, mesh)["damped_persistence"]
    damped = problem.field.physical(torch.stack([forecast(lead) for lead in (1, 2)]))[:, 0, ..., 0].numpy()
    for number in range(2):
        wanted = usual[(start + number + 1) % 12] + departures[start] * correlation ** (number + 1)
        np.testing.assert_allclose(damped[number][~land()], wanted[~land()], rtol=1e-11)


def test_the_gradient_check_passes_with_missing_values(tmp_path: Path, mesh: Mesh) -> None:
    assert gradcheck(build(tmp_path, mesh, with_holes()).gradcheck_case(), mesh).failures() == []


@pytest.mark.parametrize(
    ("gone", "tables", "message"),
    [
        (range(TRAINING - 1, TIMES), {}, r"validation = 6: no forecast can start, as values are missing at every time"),
        ((TRAINING, TRAINING + 2, TRAINING + 4), {"evaluation": {"leads": (1, 6)}}, r"no value .* at lead 1"),
        (range(TRAINING - 1), {}, "harmonics = 2: too many to be told apart by the 1 training times"),
    ],
    ids=["no start", "no truth", "too few for the cycle"],
)
def test_too_many_missing_times_are_named(
    tmp_path: Path, mesh: Mesh, gone: Any, tables: dict[str, Any], message: str
) -> None:
    field = values()
    field[list(gone)] = np.nan
    with pytest.raises(ConfigurationError, match=message):
        build(tmp_path, mesh, dataset(field), **tables)


def test_cells_without_training_values_lie_outside_or_are_refused(tmp_path: Path, mesh: Mesh) -> None:
    field = values()
    field[:TRAINING, 1, 1] = np.nan
    data = dataset(field)
    assert build(tmp_path, mesh, data).field.cells == int((~land()).sum()) - 1
    with pytest.raises(
        ConfigurationError, match="mask = 'sea': 1 cells of sst inside it have no value at any training"
    ):
        build(tmp_path, mesh, data, problem={"mask": "sea"})


# Times of their own


def irregular() -> np.ndarray[Any, Any]:
    return np.cumsum(np.random.default_rng(5).uniform(0.2, 2.0, TIMES))


def test_irregular_windows_have_each_window_s_solution_at_its_own_times(tmp_path: Path, mesh: Mesh) -> None:
    stamps = irregular()
    tables = {"model": {"harmonics": 1}, "solver": {"step_size": 0.02}}
    problem = build(tmp_path, mesh, dataset(values(), stamps), problem={"period": 8.0}, **tables)
    assert not problem.field.time.regular
    starts = [0, 9, 20]
    batch = windows(problem.field, starts, 3, torch.float64)
    together = problem.model(batch).detach()
    tendency = problem.model.solve.func
    for number, start in enumerate(starts):
        u, t, phase = batch.initial[number : number + 1], 0.0, batch.phase[number : number + 1]
        for lead in range(3):
            end = float(stamps[start + lead + 1] - stamps[start])
            steps = math.ceil((end - t) / 0.02)
            h = (end - t) / steps
            for _ in range(steps):
                with torch.no_grad():
                    k1 = tendency(torch.tensor(t), u, phase)
                    k2 = tendency(torch.tensor(t + h / 2), u + h / 2 * k1, phase)
                    k3 = tendency(torch.tensor(t + h / 2), u + h / 2 * k2, phase)
                    k4 = tendency(torch.tensor(t + h), u + h * k3, phase)
                u, t = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), t + h
            torch.testing.assert_close(together[lead, number], u[0], rtol=0, atol=1e-6)


def test_irregular_windows_do_not_depend_on_those_they_are_solved_with(tmp_path: Path, mesh: Mesh) -> None:
    problem = build(tmp_path, mesh, dataset(values(), irregular()), model={"harmonics": 0})
    together = problem.model(windows(problem.field, [0, 9, 20], 3, torch.float64))
    alone = problem.model(windows(problem.field, [9], 3, torch.float64))
    torch.testing.assert_close(together[:, 1:2], alone, rtol=0, atol=1e-12)


def test_irregular_times_pass_the_gradient_check_and_stand_in_the_forecast(tmp_path: Path, mesh: Mesh) -> None:
    stamps = irregular()
    problem = build(tmp_path, mesh, dataset(values(), stamps), model={"harmonics": 0})
    assert gradcheck(problem.gradcheck_case(), mesh).failures() == []
    with torch.no_grad():
        problem.evaluate(problem.model, tmp_path)
    data = xarray.open_dataset(tmp_path / "forecast.h5", engine="h5netcdf")
    np.testing.assert_array_equal(data.valid_time[0], stamps[TRAINING : TRAINING + 3])


# Several variables


def two_variables() -> xarray.Dataset:
    data = dataset(values())
    pressure = 1e5 + 100 * values(seed=1)
    data["ps"] = (("lon", "time", "lat"), np.where(land(), np.nan, pressure).transpose(2, 0, 1), {"units": "Pa"})
    return data.transpose("lat", "lon", "time")


def test_variables_in_other_units_have_figures_of_their_own(tmp_path: Path, mesh: Mesh) -> None:
    problem = build(tmp_path, mesh, two_variables(), problem={"variable": ("sst", "ps")})
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
        figures = problem.validation(problem.model)
    data = xarray.open_dataset(tmp_path / "forecast.h5", engine="h5netcdf")
    assert problem.units == table["units"] == "standard deviations"
    squares = []
    for number, (name, units) in enumerate((("sst", "K"), ("ps", "Pa"))):
        assert data[f"{name}_forecast"].attrs["units"] == units
        error = (data[f"{name}_forecast"] - data[f"{name}_truth"]).astype(float)
        rows = [row for row in table["channels"] if row["channel"] == name]
        assert [(row["units"], row["lead"]) for row in rows] == [(units, 1), (units, 2), (units, 3)]
        for row in rows:
            wanted = math.sqrt(float((error.sel(lead=row["lead"]) ** 2).mean()))
            assert row["model"] == pytest.approx(wanted, rel=1e-3)
        squares.append(float((error**2).mean()) / float(problem.field.deviation[number]) ** 2)
        assert figures[f"{name}_rmse"] == pytest.approx(math.sqrt(squares[-1]), rel=1e-3)
    assert figures["validation_rmse"] == pytest.approx(math.sqrt(sum(squares) / 2), rel=1e-3)


def test_variables_are_normalised_each_by_itself(tmp_path: Path, mesh: Mesh) -> None:
    problem = build(tmp_path, mesh, two_variables(), problem={"variable": ("sst", "ps")})
    for number, field in enumerate((values(), 1e5 + 100 * values(seed=1))):
        learnt = field[:TRAINING][:, ~land()]
        assert float(problem.field.mean[number]) == pytest.approx(learnt.mean(), rel=1e-13)
        assert float(problem.field.deviation[number]) == pytest.approx(learnt.std(), rel=1e-9)


# Coordinates of the forecast


def evaluated(directory: Path, mesh: Mesh, data: xarray.Dataset, **tables: Any) -> xarray.Dataset:
    problem = build(directory, mesh, data, **tables)
    with torch.no_grad():
        problem.evaluate(problem.model, directory)
    return xarray.open_dataset(directory / "forecast.h5", engine="h5netcdf")


def test_a_curvilinear_grid_is_kept_in_the_forecast_and_drawn(tmp_path: Path, mesh: Mesh) -> None:
    y, x = np.meshgrid(np.arange(NY) * 5.0, np.arange(NX) * 4.0, indexing="ij")
    data = dataset(values()).drop_vars(["lat", "lon"]).rename_dims(lat="y", lon="x")
    data = data.assign_coords(
        nav_lat=(("y", "x"), y + 0.2 * x, {"standard_name": "latitude", "units": "degrees_north"}),
        nav_lon=(("y", "x"), x - 0.2 * y, {"standard_name": "longitude", "units": "degrees_east"}),
    )
    found = evaluated(tmp_path, mesh, data, problem={"boundary": ("replicate", "replicate")})
    assert found.forecast.dims == ("start", "lead", "y", "x")
    for name in ("nav_lat", "nav_lon"):
        np.testing.assert_array_equal(found.forecast.coords[name], data[name])
        assert found[name].attrs == data[name].attrs
    assert "y" not in found.coords
    colours = image.imread(tmp_path / "report.png")
    assert float((np.ptp(colours[:600, :, :3], axis=-1) > 0.1).mean()) > 0.25


@pytest.mark.parametrize("calendar", ["noleap", "360_day", "julian"])
def test_the_forecast_has_the_dates_of_its_calendar(tmp_path: Path, mesh: Mesh, calendar: str) -> None:
    stamps = xarray.date_range("2001-01-15", periods=TIMES, freq="MS", calendar=calendar, use_cftime=True).to_numpy()
    found = evaluated(tmp_path, mesh, dataset(values(), stamps))
    np.testing.assert_array_equal(found.start, stamps[TRAINING - 1 : TIMES - 3])
    assert found.valid_time[1, 2].item() == stamps[TRAINING + 3]
    assert found.valid_time.to_numpy()[0, 0].calendar == calendar


def test_descending_axes_and_levels_keep_their_values(tmp_path: Path, mesh: Mesh) -> None:
    data = dataset(values(channels=3)).isel(lat=slice(None, None, -1))
    data = data.assign_coords(level=("level", [850.0, 500.0, 200.0], {"units": "hPa", "positive": "down"}))
    found = evaluated(tmp_path, mesh, data, problem={"level": [200, 850]})
    np.testing.assert_array_equal(found.level, [200, 850])
    np.testing.assert_array_equal(found.lat, data.lat)
    assert found.level.attrs["units"] == "hPa"
    wanted = data.sst.isel(time=TRAINING).sel(level=[200, 850])
    np.testing.assert_allclose(found.truth[0, 0], wanted.transpose("lat", "lon", "level"), rtol=1e-6)
    named = data.assign_coords(level=["low", "middle", "high"])
    for name in ("named", "one"):
        (tmp_path / name).mkdir()
    found = evaluated(tmp_path / "named", mesh, named, problem={"level": ["high", "low"]})
    assert list(found.level.to_numpy()) == ["high", "low"]
    one = evaluated(tmp_path / "one", mesh, data, problem={"level": 500})
    assert one.forecast.dims == ("start", "lead", "lat", "lon")
    assert float(one.level) == 500.0
