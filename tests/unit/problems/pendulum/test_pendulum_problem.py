"""The pendulum problem on one rank: batches, loss and gradient through the DAE, training, errors, drift, evaluation."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray

from pnode_dist import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.forecast_data import windows
from pnode_dist.problems.pendulum.problem import PendulumProblem
from pnode_dist.train import loop
from pnode_dist.verify.gradcheck import gradcheck
from tests.unit.problems.pendulum.plain_pendulum import (
    GRAVITY,
    INTERVAL,
    LENGTH,
    PARAMETERS,
    TIMES,
    TRAINING,
    VALIDATION,
    WINDOW,
    applied_force,
    config,
    eliminated,
    learnt_force,
    trapezoidal_rollout,
)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """One rank as one state, for the whole file."""
    with Mesh() as mesh:
        yield mesh


def built(mesh: Mesh, **tables: Any) -> PendulumProblem:
    return PendulumProblem(config(**tables), mesh, torch.float64)


def leaves(problem: PendulumProblem) -> dict[str, torch.Tensor]:
    """The parameters once more, under the names of the force."""
    return {
        name.removeprefix("solve.func.force."): value.detach().clone().requires_grad_()
        for name, value in problem.model.named_parameters()
    }


# Training


def test_an_epoch_has_every_window_of_the_training_trajectories_once(mesh: Mesh) -> None:
    batches = list(built(mesh).batches(1))
    assert sorted(start for batch in batches for start in batch.starts) == [
        (0, first) for first in range(TIMES - WINDOW)
    ]
    assert all(batch.initial.shape == (len(batch.starts), TRAINING, 5) for batch in batches)


def test_loss_and_gradient_are_those_of_the_motion_without_the_tension(mesh: Mesh) -> None:
    problem = built(mesh, solver={"petsc_options": {"snes_rtol": 1e-12}})
    starts = (2, 0)
    loss = problem.loss(
        problem.model, windows(problem.samples, [(0, start) for start in starts], WINDOW, torch.float64)
    )
    loss.backward()
    expected, values = leaves(problem), problem.samples.values[0]
    errors = [
        trapezoidal_rollout(expected, problem.motions, values[start], WINDOW, 2)
        - values[start + 1 : start + 1 + WINDOW]
        for start in starts
    ]
    whole = (torch.stack(errors) / problem.motions.deviation).square().mean()
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-9)
    for name, value in problem.model.named_parameters():
        wanted = expected[name.removeprefix("solve.func.force.")].grad
        torch.testing.assert_close(value.grad, wanted, rtol=1e-7, atol=1e-9)


def test_windows_start_with_the_tension_that_the_learnt_force_asks_for(mesh: Mesh) -> None:
    problem = built(mesh)
    batch = windows(problem.samples, [(0, 1), (0, 3)], WINDOW, torch.float64)
    found = problem.model.initial(batch)
    assert torch.equal(found[..., :4], batch.initial[..., :4])
    expected = eliminated(leaves(problem), problem.motions, batch.initial)[..., 4]
    torch.testing.assert_close(found[..., 4], expected.detach(), rtol=1e-9, atol=1e-9)
    assert (found[..., 4] - batch.initial[..., 4]).abs().max() > 0.1


@pytest.mark.parametrize("method", ["cn", "beuler"])
def test_the_gradient_check_passes(mesh: Mesh, method: str) -> None:
    result = gradcheck(built(mesh, solver={"method": method}).gradcheck_case(), mesh)
    assert result.failures() == []
    assert result.relative_error < 1e-7
    assert result.state_size == 2 * TRAINING * 5


def test_a_short_training_lowers_loss_and_validation_error(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh, training={"epochs": 6, "learning_rate": 0.02, "validate_every": 1})
    outcome = loop.train(problem, problem.config.training, mesh, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    errors = [record["figures"]["validation_rmse"] for record in records if record["kind"] == "validation"]
    assert np.mean(losses[-2:]) < 0.5 * np.mean(losses[:2])
    assert outcome.figures["validation_rmse"] == errors[-1] < errors[0]


# Evaluation


@pytest.mark.usefixtures("undrawn")
def test_evaluate_gives_the_errors_of_a_naive_computation(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh)
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
        figures = problem.validation(problem.model)
    data = problem.motions
    truth, vacuum = data.validation, data.vacuum
    mean, deviation = data.mean.numpy(), data.deviation.numpy()
    with h5py.File(tmp_path / "forecast.h5") as file:
        forecast, true_force = file["forecast"][:], file["true_force"][:]
        np.testing.assert_array_equal(file["truth"][:], truth)
    candidates = {
        "model": forecast,
        "persistence": truth[:1],
        "training_mean": mean,
        "vacuum": vacuum,
        "true_force": true_force,
    }

    def error(name: str, leads: Any) -> float:
        squares = np.broadcast_to(((candidates[name] - truth) / deviation) ** 2, truth.shape)
        return float(np.sqrt(squares[leads].mean()))

    assert [row["lead"] for row in table["rmse"]] == [1, 3, 5]
    for row in table["rmse"]:
        assert row["seconds"] == pytest.approx(row["lead"] * INTERVAL)
        for name in candidates:
            assert row[name] == pytest.approx(error(name, row["lead"]), rel=1e-9)
        assert figures[f"lead_{row['lead']}"] == pytest.approx(row["model"], rel=1e-12)
    for name in candidates:
        assert table["all_leads"][name] == pytest.approx(error(name, slice(1, None)), rel=1e-9)
    assert next(iter(figures)) == "validation_rmse"
    assert figures["validation_rmse"] == pytest.approx(table["all_leads"]["model"], rel=1e-12)
    assert json.loads(json.dumps(table)) == table


@pytest.mark.usefixtures("undrawn")
def test_the_solve_with_the_true_force_is_near_the_truth(mesh: Mesh, tmp_path: Path) -> None:
    with torch.no_grad():
        problem = built(mesh)
        coarse = problem.evaluate(problem.model, tmp_path)["all_leads"]["true_force"]
        problem = built(mesh, solver={"step_size": INTERVAL / 8})
        fine = problem.evaluate(problem.model, tmp_path)["all_leads"]["true_force"]
    # A quarter of the step, a sixteenth of the error: the method is of second order on the DAE too.
    assert coarse < 0.05
    assert coarse / fine == pytest.approx(16, rel=0.1)


@pytest.mark.usefixtures("undrawn")
def test_the_error_of_the_force_and_the_drift_are_those_of_a_naive_computation(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh)
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
    states = torch.from_numpy(problem.motions.validation[1:]).flatten(0, 1)
    learnt = learnt_force(leaves(problem), problem.motions, states).detach().numpy()
    true = np.array([applied_force(state[2:4].numpy()) for state in states])
    drag = true - [0.0, -GRAVITY]
    assert table["force"]["error"] == pytest.approx(np.sqrt(((learnt - true) ** 2).sum(axis=-1).mean()), rel=1e-9)
    assert table["force"]["drag"] == pytest.approx(np.sqrt((drag**2).sum(axis=-1).mean()), rel=1e-9)
    with h5py.File(tmp_path / "forecast.h5") as file:
        x, y, vx, vy, _ = np.moveaxis(file["forecast"][1:], -1, 0)
    assert table["drift"]["length"] == pytest.approx(np.abs(np.hypot(x, y) / LENGTH - 1).max(), rel=1e-9)
    assert table["drift"]["radial_speed"] == pytest.approx(np.abs((x * vx + y * vy) / np.hypot(x, y)).max(), rel=1e-9)
    assert PARAMETERS.length == LENGTH


def test_the_file_holds_truth_and_rollout_with_their_coordinates(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh)
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
    data = xarray.open_dataset(tmp_path / "forecast.h5", engine="h5netcdf")
    for name in ("truth", "forecast", "persistence", "training_mean", "vacuum", "true_force"):
        assert data[name].dims == ("time", "trajectory", "component")
        assert data[name].shape == (TIMES, VALIDATION, 5)
    np.testing.assert_allclose(data.time, np.arange(TIMES) * INTERVAL)
    assert [str(name) for name in data.component.to_numpy()] == ["x", "y", "vx", "vy", "tension"]
    np.testing.assert_array_equal(data.forecast[0], data.truth[0])
    assert table["report"] == str(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


# What cannot be done


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"evaluation": {"leads": (1, 6)}},
            r"\[evaluation\] leads = \[1, 6\]: must be at most 5, one less than \[problem\] times",
        ),
        ({"trajectory": {"ram": 300}}, "ram = 300, disk = 0: too small for one checkpoint of 320 bytes"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_computed(
    mesh: Mesh, tables: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pnode_dist.problems.pendulum.problem.generate", lambda *_: pytest.fail("computed"))
    with pytest.raises(ConfigurationError, match=message):
        built(mesh, **tables)


def test_a_method_without_mass_matrices_is_refused(mesh: Mesh) -> None:
    problem = built(mesh, solver={"method": "rk4"})
    with pytest.raises(ConfigurationError, match="mass"):
        problem.loss(problem.model, next(problem.batches(1)))
