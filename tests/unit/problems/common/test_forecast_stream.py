"""Forecasts lead by lead: the parts that are handed on, compared with forecasts that are held whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pnode_dist import ConfigurationError, ForecastProblem, Mesh, TrajectoryData
from pnode_dist.problems.common.forecast_model import ForecastModel
from pnode_dist.problems.common.forecast_stream import Row, each_lead
from tests.unit.problems.common.test_forecast_problem import D, Decay, Vector, built, exact


class Irregular(Vector):
    """One trajectory with times that repeat every third interval, so that some windows are solved together."""

    trajectories = 1
    times = np.cumsum([0.0, *[0.125, 0.25, 0.0625] * 5])


TABLES: dict[str, Any] = {"problem": {"type": "own", "validation": 10}, "evaluation": {"leads": [1, 2, 4]}}


def parts(problem: Any, forecast: Any, size: int) -> tuple[torch.Tensor, list[tuple[int, list[int]]]]:
    """The forecast that is put together from its parts, and their leads and windows in order."""
    batch = problem.held_out_windows(D)
    whole = torch.full_like(batch.targets, torch.nan)
    order = []

    def take(row: Row) -> None:
        order.append((row.lead, list(row.starts)))
        whole[row.lead - 1, list(row.starts)] = row.states

    each_lead(forecast, batch, size, D, take)
    return whole, order


def test_the_parts_of_a_model_are_those_of_its_whole_forecast(mesh: Mesh) -> None:
    problem = built(Irregular, mesh, **TABLES)
    batch = problem.held_out_windows(D)
    with torch.no_grad():
        expected = problem.model(batch)
    for size in (3, 100):
        found, order = parts(problem, problem.model, size)
        assert torch.equal(found, expected)
    # Windows at the same times are solved together, and each solve goes from lead to lead.
    assert order[:4] == [(lead, [0, 3, 6]) for lead in (1, 2, 3, 4)]


def test_functions_tensors_and_models_are_the_same_forecast(mesh: Mesh) -> None:
    problem = built(Irregular, mesh, **TABLES)
    with torch.no_grad():
        whole = problem.model(problem.held_out_windows(D))
    for forecast in (whole, lambda lead: whole[lead - 1], problem.model):
        assert torch.equal(parts(problem, forecast, 4)[0], whole)


def test_a_model_with_a_forward_of_its_own_is_computed_by_it(mesh: Mesh) -> None:
    class Doubled(ForecastModel):
        def forward(self, batch: Any) -> torch.Tensor:
            return 2 * super().forward(batch)

    problem = built(Irregular, mesh, **TABLES)
    doubled = Doubled(problem.build_solve(Decay()))
    assert torch.equal(parts(problem, doubled, 4)[0], 2 * parts(problem, problem.model, 4)[0])


def test_a_solve_returns_its_outputs_again_after_a_stream_that_failed(mesh: Mesh) -> None:
    problem = built(Irregular, mesh, **TABLES)

    def refuse(row: Row) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        each_lead(problem.model, problem.held_out_windows(D), 4, D, refuse)
    assert problem.model.solve.on_output is None
    assert problem.model(problem.held_out_windows(D)) is not None


def test_figures_baselines_and_variables_of_a_problem_are_in_its_evaluation(mesh: Mesh, tmp_path: Path) -> None:
    class Largest:
        def __init__(self) -> None:
            self.found: dict[str, float] = {}

        def add(self, name: str, row: Row) -> None:
            self.found[name] = max(self.found.get(name, 0.0), row.states.max().item())

        def result(self) -> dict[str, float]:
            return self.found

    class Gaps(Irregular):
        def load_data(self) -> Any:
            values = exact(self.times, 1, self.entries)
            values[0, 9, 1] = np.nan
            return TrajectoryData(values, self.times)

        def baselines(self, batch: Any) -> Any:
            return {"constant": torch.ones_like(batch.targets), "exact": self.build_model(lambda t, u: -0.3 * u)}

        def figures(self, batch: Any) -> Any:
            return {"largest": Largest(), "windows": len(batch.starts)}

        def variables(self, batch: Any) -> Any:
            from pnode_dist.report.dataset_file import Variable

            return {"rate": Variable((), 0.3)}

    tables = {**TABLES, "problem": {**TABLES["problem"], "missing": "mask"}}
    problem = built(Gaps, mesh, **tables)
    batch = problem.held_out_windows(D)
    with torch.no_grad():
        result = problem.evaluate(problem.model, tmp_path)
        forecasts = {"model": problem.model(batch), "constant": torch.ones_like(batch.targets)}
    there = batch.weights.double()
    assert there.sum() < there.numel()
    for name, forecast in forecasts.items():
        means = ((forecast - batch.targets).square() * there).flatten(1).sum(1) / there.flatten(1).sum(1)
        assert [row[name] for row in result["rmse"]] == pytest.approx(means[[0, 1, 3]].sqrt().tolist(), rel=1e-12)
        assert result["largest"][name] == forecast.max().item()
    assert result["rmse"][2]["exact"] < 1e-6
    assert result["windows"] == len(batch.starts)
    with h5py.File(tmp_path / "forecast.h5") as file:
        assert file["rate"][()] == 0.3
        assert np.array_equal(file["forecast"][:, 1:], forecasts["model"].transpose(0, 1).float().numpy())
        truth = batch.targets.masked_fill(there == 0, torch.nan).transpose(0, 1).float().numpy()
        assert np.array_equal(file["truth"][:, 1:], truth, equal_nan=True)
        assert np.array_equal(file["truth"][:, 0], batch.initial.float().numpy())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forecast.h5", "report.png"]


def test_a_problem_is_a_forecast_problem_with_any_writer(mesh: Mesh, tmp_path: Path) -> None:
    written: list[tuple[str, int]] = []

    class Listing:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            written.append(("closed", 0))

        def write(self, name: str, row: Row) -> None:
            written.append((name, row.lead))

    class Own(Vector):
        plots = "tests.unit.problems.common.test_forecast_stream"

        def create_file(self, path: Path, batch: Any, forecasts: Any, others: Any) -> Any:
            assert list(forecasts) == ["model", "persistence", "training_mean"]
            return Listing()

    problem = built(Own, mesh, problem={"type": "own"})
    assert isinstance(problem, ForecastProblem)
    problem.evaluate(problem.model, tmp_path)
    assert written[:6] == [("model", lead) for lead in range(1, 7)]
    assert written[-7:] == [*[("truth", lead) for lead in range(1, 7)], ("closed", 0)]


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (torch.zeros(5, 1, 3), "'wrong' has 5 leads, not 6"),
        (torch.zeros(6, 1, 2), r"'wrong' has shape \(1, 2\) at a lead: must be \(1, 3\)"),
        (lambda lead: torch.zeros(()), r"'wrong' has shape \(\) at a lead: must be \(1, 3\)"),
    ],
    ids=["too few leads", "too few entries", "a number"],
)
def test_a_baseline_of_another_shape_is_refused_and_leaves_no_file(
    baseline: Any, message: str, mesh: Mesh, tmp_path: Path
) -> None:
    class Wrong(Vector):
        def baselines(self, batch: Any) -> Any:
            return {"wrong": baseline}

    problem = built(Wrong, mesh, problem={"type": "own"})
    with pytest.raises(ConfigurationError, match=f"^Wrong.baselines: {message}$"):
        problem.evaluate(problem.model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def draw_report(*given: Any) -> None:
    """No picture, as there is no file."""
