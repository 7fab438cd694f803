"""The Robertson problem on one rank: batches, loss and gradient, training, errors, the rival, evaluation."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray

from pnode_dist import Mesh, Trajectory
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.forecast_data import windows
from pnode_dist.problems.robertson.data import generate
from pnode_dist.problems.robertson.physics import Array
from pnode_dist.problems.robertson.problem import RobertsonProblem
from pnode_dist.train import loop
from tests.unit.problems.robertson.plain_robertson import (
    LOG_TIMES,
    TIMES,
    TRAINING,
    VALIDATION,
    WINDOW,
    config,
    problem_config,
    trapezoidal_rollout,
)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """One rank as one state, for the whole file."""
    with Mesh() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def data() -> tuple[Array, Array]:
    """The trajectories, which all tests share."""
    return generate(problem_config())


@pytest.fixture
def built(mesh: Mesh, data: tuple[Array, Array], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The problem of a small configuration, from data that were computed once."""
    monkeypatch.setattr("pnode_dist.problems.robertson.problem.generate", lambda *_: data)

    def build_problem(**tables: Any) -> RobertsonProblem:
        return RobertsonProblem(config(**tables), mesh, torch.float64)

    return build_problem


def leaves(problem: RobertsonProblem) -> dict[str, torch.Tensor]:
    """The parameters once more, under the names of the right-hand side."""
    return {
        name.removeprefix("solve.func."): value.detach().clone().requires_grad_()
        for name, value in problem.model.named_parameters()
    }


# Training


def test_an_epoch_has_every_window_of_the_training_trajectories_once(built: Any) -> None:
    batches = list(built().batches(1))
    assert sorted(start for batch in batches for start in batch.starts) == [
        (0, first) for first in range(TIMES - WINDOW)
    ]
    assert all(batch.initial.shape == (len(batch.starts), TRAINING, 3) for batch in batches)


def test_loss_and_gradient_are_those_of_a_naive_trapezoidal_rule(built: Any) -> None:
    problem = built(solver={"petsc_options": {"snes_rtol": 1e-12, "snes_linesearch_type": "basic"}})
    # One start before the fast reaction is over, and one where it is a million times faster than the step.
    starts = (4, 11)
    loss = problem.loss(
        problem.model, windows(problem.samples, [(0, start) for start in starts], WINDOW, torch.float64)
    )
    loss.backward()
    expected, values = leaves(problem), problem.samples.values[0]
    errors = [
        trapezoidal_rollout(expected, problem.model.solve.func.rate, values[start], 10.0 ** LOG_TIMES[start], WINDOW)
        - values[start + 1 : start + 1 + WINDOW]
        for start in starts
    ]
    whole = torch.stack(errors).abs().mean()
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-9)
    for name, value in problem.model.named_parameters():
        wanted = expected[name.removeprefix("solve.func.")].grad
        torch.testing.assert_close(value.grad, wanted, rtol=1e-6, atol=1e-9)


def test_a_short_training_lowers_loss_and_validation_error(built: Any, mesh: Mesh, tmp_path: Path) -> None:
    problem = built(training={"epochs": 8, "learning_rate": 0.02, "validate_every": 1})
    outcome = loop.train(problem, problem.config.training, mesh, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    errors = [record["figures"]["validation_mae"] for record in records if record["kind"] == "validation"]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert outcome.figures["validation_mae"] == errors[-1] < errors[0]


def test_the_configured_solver_is_the_one_that_solves(built: Any) -> None:
    chosen = {"method": "beuler", "step_size": 0.25, "preconditioner": "block", "petsc_options": {"snes_rtol": 1e-8}}
    problem = built(solver=chosen, trajectory={"ram": "1MiB"})
    solve = problem.model.solve
    assert (solve.method, solve.step_size, solve.preconditioner) == ("beuler", 0.25, "block")
    assert solve.options == {"snes_rtol": 1e-8}
    assert solve.trajectory == Trajectory(ram="1MiB")
    assert problem.loss(problem.model, next(problem.batches(1))).isfinite()
    assert problem.solve_statistics().forward_steps == 2 * WINDOW


# Evaluation


@pytest.mark.usefixtures("undrawn")
def test_evaluate_gives_the_errors_of_a_naive_computation(built: Any, tmp_path: Path) -> None:
    problem = built()
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
        figures = problem.validation(problem.model)
    truth, training = problem.held_out.values[0].numpy(), problem.samples.values[0].numpy()
    lowest, width = problem.physical(torch.tensor([[0.0], [1.0]])).numpy()
    width = width - lowest
    with h5py.File(tmp_path / "forecast.h5") as file:
        forecast = (file["forecast"][:] - lowest) / width
        np.testing.assert_allclose(file["truth"][:], truth * width + lowest, rtol=1e-12)
    candidates = {
        "model": np.abs(forecast - truth)[1:],
        "persistence": np.abs(truth[:1] - truth)[1:],
        "training_mean": np.abs(training.mean(axis=1, keepdims=True) - truth)[1:],
    }
    assert [row["lead"] for row in table["mae"]] == [1, 7, 14]
    for row in table["mae"]:
        assert row["time"] == pytest.approx(10.0 ** LOG_TIMES[row["lead"]], rel=1e-12)
        for name, errors in candidates.items():
            assert row[name] == pytest.approx(errors[row["lead"] - 1].mean(), rel=1e-9)
        assert figures[f"lead_{row['lead']}"] == pytest.approx(row["model"], rel=1e-12)
    for name, errors in candidates.items():
        assert table["all_leads"][name] == pytest.approx(errors.mean(), rel=1e-9)
        assert table["all_leads_from_1_0_0"][name] == pytest.approx(errors[:, 0].mean(), rel=1e-9)
    assert next(iter(figures)) == "validation_mae"
    assert figures["validation_mae"] == pytest.approx(table["all_leads"]["model"], rel=1e-12)
    assert json.loads(json.dumps(table)) == table


@pytest.mark.usefixtures("undrawn")
def test_the_solves_of_the_trained_model_are_compared(built: Any, tmp_path: Path) -> None:
    problem = built(rival={"rtol": 1e-7, "atol": 1e-9, "steps": 60})
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
    trained, fine, rival = table["solves"]
    leads = TIMES - 1
    assert (trained["steps"], fine["steps"]) == (leads, 16 * leads)
    assert trained["newton_iterations"] >= leads
    assert trained["mae"] == pytest.approx(table["all_leads"]["model"], rel=1e-6)
    assert fine["mae_to_fine_steps"] == 0 < trained["mae_to_fine_steps"]
    # The rival is stopped where its steps have become too many, and there it has followed the same equations.
    assert rival["steps"] >= 60
    assert rival["stopped"] == f"after {rival['steps']} steps"
    assert rival["reached_time"] < 100
    assert rival["mae_to_fine_steps"] < 1e-3
    with h5py.File(tmp_path / "forecast.h5") as file:
        steps = file["steps_rival"][:]
        reached = np.isfinite(steps)
        assert reached[: reached.sum()].all()
        assert file["time"][reached.sum() - 1] == pytest.approx(rival["reached_time"])
        assert steps[reached][-1] == rival["steps"]
        np.testing.assert_array_equal(np.isfinite(file["rival"][:]).all(axis=(1, 2)), reached)


@pytest.mark.usefixtures("undrawn")
def test_a_rival_whose_steps_shrink_to_nothing_is_reported(
    built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pnode_dist.errors import StepSizeError
    from pnode_dist.ode.odeint import NeuralODE

    solve = NeuralODE.forward

    def failing(self: NeuralODE, u0: Any, t: Any, *args: Any) -> Any:
        if self.method == "dopri5" and t[0] > 1:
            raise StepSizeError("step 7: its size fell to 1e-17")
        return solve(self, u0, t, *args)

    monkeypatch.setattr(NeuralODE, "forward", failing)
    problem = built()
    with torch.no_grad():
        rival = problem.evaluate(problem.model, tmp_path)["solves"][-1]
    assert rival["stopped"] == "step 7: its size fell to 1e-17"
    assert rival["reached_time"] == pytest.approx(10.0 ** LOG_TIMES[3])


def test_the_report_is_drawn_and_the_file_holds_truth_and_rollout(built: Any, tmp_path: Path) -> None:
    problem = built()
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
    assert table["report"] == str(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    data = xarray.open_dataset(tmp_path / "forecast.h5", engine="h5netcdf")
    for name in ("truth", "forecast", "persistence", "training_mean", "rival"):
        assert data[name].dims == ("time", "trajectory", "component")
        assert data[name].shape == (TIMES, VALIDATION, 3)
    np.testing.assert_allclose(data.time, 10.0**LOG_TIMES)
    assert [str(name) for name in data.component.to_numpy()] == ["A", "B", "C"]
    np.testing.assert_array_equal(data.forecast[0], data.truth[0])
    np.testing.assert_allclose(data.truth.sum("component")[:, 0], 1.0, rtol=1e-9)


# What cannot be done


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"evaluation": {"leads": (1, 15)}},
            r"\[evaluation\] leads = \[1, 15\]: must be at most 14, one less than \[problem\] times",
        ),
        ({"trajectory": {"ram": 400}}, "ram = 400, disk = 0: too small for one checkpoint of 480 bytes"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_computed(
    mesh: Mesh, tables: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pnode_dist.problems.robertson.problem.generate", lambda *_: pytest.fail("computed"))
    with pytest.raises(ConfigurationError, match=message):
        RobertsonProblem(config(**tables), mesh, torch.float64)
