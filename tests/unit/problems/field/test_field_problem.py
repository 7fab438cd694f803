"""The field problem on one rank: batches, errors, evaluation."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from pnode_dist import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.field.model import windows
from pnode_dist.problems.field.problem import FieldProblem, build_field
from pnode_dist.verify.gradcheck import gradcheck
from tests.unit.problems.field.synthetic_fields import (
    NX,
    NY,
    TIMES,
    VALIDATION,
    WINDOW,
    config,
    dataset,
    land,
    months,
    values,
    write,
)

TRAINING = TIMES - VALIDATION


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "sst.nc", dataset(values()))


def build(path: Path, mesh: Mesh, dtype: torch.dtype = torch.float64, **tables: Any) -> FieldProblem:
    return build_field(config(path, **tables), mesh, dtype)


# Batches


def test_an_epoch_has_every_training_window_once_and_none_of_the_validation(path: Path, mesh: Mesh) -> None:
    problem = build(path, mesh)
    batches = list(problem.batches(1))
    starts = [start for batch in batches for start in batch.starts]
    assert sorted(starts) == list(range(TRAINING - WINDOW))
    assert max(starts) + WINDOW == TRAINING - 1
    assert [len(batch.starts) for batch in batches] == [4, 4, 4, 4, 4, 1]


def test_the_order_of_the_windows_depends_on_seed_and_epoch(path: Path, mesh: Mesh) -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        return [batch.starts for batch in build(path, mesh, run={"seed": seed}).batches(epoch)]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_training_does_not_see_the_validation_part(tmp_path: Path, path: Path, mesh: Mesh) -> None:
    other = values()
    other[TRAINING:] = 500 - other[TRAINING:]
    problem, changed = build(path, mesh), build(write(tmp_path / "other.nc", dataset(other)), mesh)
    for batch, same in zip(problem.batches(1), changed.batches(1), strict=True):
        assert torch.equal(problem.loss(problem.model, batch), changed.loss(changed.model, same))
    assert problem.validation(problem.model) != changed.validation(changed.model)


# Errors


def naive_table(forecast: np.ndarray[Any, Any] | None = None) -> dict[str, list[float]]:
    """Root mean square errors by lead, cell by cell and month by month; `forecast` is `[start, lead, y, x]` in K."""
    field, leads = values(), 3
    squares: dict[str, list[list[float]]] = {}
    starts = range(TRAINING - 1, TIMES - leads)

    def usual(time: int, y: int, x: int) -> float:
        return float(np.mean([field[month, y, x] for month in range(time % 12, TRAINING, 12)]))

    products, variances = [], []
    for month in range(TRAINING - 1):
        for y, x in zip(*np.nonzero(~land()), strict=True):
            today, next_month = field[month, y, x] - usual(month, y, x), field[month + 1, y, x] - usual(month + 1, y, x)
            products.append(today * next_month)
            variances.append(today**2)
    persisting = math.fsum(products) / math.fsum(variances)

    for number, start in enumerate(starts):
        for lead in range(1, leads + 1):
            for y, x in zip(*np.nonzero(~land()), strict=True):
                truth, now, mean = field[start + lead, y, x], field[start, y, x], usual(start + lead, y, x)
                candidates = {
                    "persistence": now,
                    "climatology": mean,
                    "anomaly_persistence": mean + now - usual(start, y, x),
                    "damped_persistence": mean + (now - usual(start, y, x)) * persisting**lead,
                }
                if forecast is not None:
                    candidates["model"] = forecast[number, lead - 1, y, x]
                for name, value in candidates.items():
                    squares.setdefault(name, [[] for _ in range(leads)])[lead - 1].append((value - truth) ** 2)
    return {name: [float(np.sqrt(np.mean(entry))) for entry in by_lead] for name, by_lead in squares.items()}


@pytest.mark.usefixtures("undrawn")
def test_evaluate_gives_the_errors_of_a_naive_computation(path: Path, mesh: Mesh, tmp_path: Path) -> None:
    problem = build(path, mesh)
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
    # The file rounds to float32, that is to 3e-5 K.
    stored = xarray.open_dataset(tmp_path / "forecast.h5", engine="h5netcdf").forecast.to_numpy().astype(float)
    expected = naive_table(stored)
    assert [row["lead"] for row in table["rmse"]] == [1, 2, 3]
    for number, row in enumerate(table["rmse"]):
        for name in ("persistence", "climatology", "anomaly_persistence", "damped_persistence"):
            assert row[name] == pytest.approx(expected[name][number], rel=1e-11)
        assert row["model"] == pytest.approx(expected["model"][number], rel=1e-4)
    assert table["forecasts"] == "4 starts, 2002-12 to 2003-03"
    assert table["training"] == "2001-01 to 2002-12, 24 times"
    assert table["cells"] == int((~land()).sum())
    assert json.loads(json.dumps(table)) == table


@pytest.mark.usefixtures("undrawn")
def test_validation_figures_are_those_of_the_evaluation(path: Path, mesh: Mesh, tmp_path: Path) -> None:
    problem = build(path, mesh, evaluation={"leads": (1, 3)})
    with torch.no_grad():
        figures = problem.validation(problem.model)
        rows = problem.evaluate(problem.model, tmp_path)["rmse"]
    assert list(figures) == ["validation_rmse", "lead_1", "lead_3"]
    assert {f"lead_{row['lead']}": row["model"] for row in rows}.items() <= figures.items()


@pytest.mark.usefixtures("undrawn")
def test_forecast_and_truth_lie_in_the_file_with_their_coordinates(path: Path, mesh: Mesh, tmp_path: Path) -> None:
    problem = build(path, mesh)
    with torch.no_grad():
        problem.evaluate(problem.model, tmp_path)
        expected = problem.model(windows(problem.field, [TRAINING], 3, torch.float64))
    data = xarray.open_dataset(tmp_path / "forecast.h5", engine="h5netcdf")
    assert data.forecast.dims == ("start", "lead", "lat", "lon")
    assert data.forecast.shape == (4, 3, NY, NX)
    np.testing.assert_array_equal(data.start, months()[TRAINING - 1 : TIMES - 3])
    source = xarray.open_dataset(path, engine="h5netcdf")
    for start in range(4):
        for lead in range(3):
            time = TRAINING + start + lead
            np.testing.assert_allclose(data.truth[start, lead], source.sst[time], rtol=1e-7)
            assert data.valid_time[start, lead] == source.time[time]
    physical = problem.field.physical(expected[:, 0])[..., 0].numpy()
    np.testing.assert_allclose(data.forecast[1], np.where(land(), np.nan, physical), rtol=1e-6)


def test_the_report_is_drawn(path: Path, mesh: Mesh, tmp_path: Path) -> None:
    problem = build(path, mesh)
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
    assert table["report"] == str(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_directory_that_cannot_be_written_is_named(path: Path, mesh: Mesh, tmp_path: Path) -> None:
    problem = build(path, mesh)
    with (
        torch.no_grad(),
        pytest.raises(ConfigurationError, match=r"gone/forecast.h5: cannot be written: .*No such file or directory"),
    ):
        problem.evaluate(problem.model, tmp_path / "gone")


# What the data do not allow


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"evaluation": {"leads": (1, 7)}},
            r"\[evaluation\] leads = \[1, 7\]: must be at most \[problem\] validation = 6",
        ),
        (
            {"problem": {"processes": (2, 1)}},
            r"\[problem\] processes: .*must multiply to 1 ranks; .*a halo of 1",
        ),
        (
            {"model": {"dilations": (7,)}},
            r"\[mesh\] state = 1: a grid of 6 x 9 points cannot be split over 1 rank\(s\) with 7",
        ),
        ({"trajectory": {"ram": "1KiB"}}, "ram = '1KiB', disk = 0: too small for one checkpoint of 1728 bytes"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_computed(
    path: Path, mesh: Mesh, tables: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(path, mesh, **tables)


# Gradient


def test_the_gradient_check_passes(path: Path, mesh: Mesh) -> None:
    result = gradcheck(build(path, mesh).gradcheck_case(), mesh)
    assert result.failures() == []
    assert result.relative_error < 1e-9
    assert result.state_size == NY * NX


def test_the_solve_spills_to_disk_with_the_same_loss_and_gradient(path: Path, mesh: Mesh, tmp_path: Path) -> None:
    def gradient(**trajectory: Any) -> tuple[list[torch.Tensor], int]:
        problem = build(path, mesh, trajectory=trajectory)
        problem.loss(problem.model, next(problem.batches(1))).backward()  # type: ignore[no-untyped-call]
        gradients = [value.grad for value in problem.model.parameters() if value.grad is not None]
        return gradients, problem.solve_statistics().bytes_written

    kept, nothing = gradient()
    spilled, written = gradient(ram_slots=1, disk_slots=3, directory=str(tmp_path))
    assert nothing == 0
    assert written > 0
    assert all(torch.equal(a, b) for a, b in zip(kept, spilled, strict=True))
