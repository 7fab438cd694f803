"""The Gray-Scott problem on one rank: batches, training, errors, evaluation."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray

from pnode_dist import Mesh, Trajectory
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.gray_scott.problem import GrayScottProblem
from pnode_dist.train import loop
from tests.oracles.right_hand_sides import distance
from tests.unit.problems.gray_scott.plain_gray_scott import (
    DOMAIN,
    INTERVAL,
    NX,
    NY,
    TIMES,
    TRAINING,
    VALIDATION,
    WINDOW,
    config,
    trajectory,
)


def built(mesh: Mesh, **tables: Any) -> GrayScottProblem:
    return GrayScottProblem(config(**tables), mesh, torch.float64)


# Batches


def test_an_epoch_has_every_window_of_the_training_trajectories_once(mesh: Mesh) -> None:
    batches = list(built(mesh).batches(1))
    starts = [start for batch in batches for start in batch.starts]
    firsts = range(TIMES - WINDOW)
    assert sorted(starts) == [(number, first) for number in range(TRAINING) for first in firsts]
    assert [len(batch.starts) for batch in batches] == [2, 2, 2]


def test_a_window_holds_the_samples_from_its_start_on(mesh: Mesh) -> None:
    problem = built(mesh)
    for batch in problem.batches(1):
        for number, (which, first) in enumerate(batch.starts):
            values = problem.samples.values[which]
            assert torch.equal(batch.initial[number], values[first])
            assert torch.equal(batch.targets[:, number], values[first + 1 : first + 1 + WINDOW])


# Training


def test_a_short_training_lowers_loss_and_validation_error(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh, training={"epochs": 6, "learning_rate": 0.01, "validate_every": 1})
    outcome = loop.train(problem, problem.config.training, mesh, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    errors = [record["figures"]["validation_rmse"] for record in records if record["kind"] == "validation"]
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    assert outcome.figures["validation_rmse"] == errors[-1] < errors[0]


def test_the_configured_solver_is_the_one_that_solves(mesh: Mesh) -> None:
    chosen = {"method": "dopri5", "step_size": 0.5, "rtol": 1e-5, "atol": 1e-7, "adaptor": "dsp", "jumps": (0.25,)}
    problem = built(mesh, solver=chosen, trajectory={"ram": "1MiB"})
    solve = problem.model.solve
    assert {name: getattr(solve, name) for name in chosen} == chosen
    bounds = {"adaptor": "pid", "pcoeff": 0.4, "icoeff": 0.3, "dcoeff": 0.0, "first_step": 0.1, "dt_min": 1e-6}
    bounds |= {"dt_max": 1.0, "max_steps": 1000}
    bounded = built(mesh, solver={"method": "tsit5", "rtol": 1e-5, **bounds}).model.solve
    assert {name: getattr(bounded, name) for name in bounds} == bounds
    assert solve.trajectory == Trajectory(ram="1MiB")
    assert problem.loss(problem.model, next(problem.batches(1))).isfinite()


def test_f_in_lower_precision_leaves_parameters_and_gradients_in_their_type(mesh: Mesh) -> None:
    gradients = {}
    for name in (None, "float32"):
        problem = built(mesh, solver={"compute_dtype": name})
        problem.loss(problem.model, next(problem.batches(1))).backward()
        gradients[name] = torch.cat([value.grad.reshape(-1) for value in problem.model.parameters()])
    assert gradients["float32"].dtype is torch.float64
    assert 0 < distance(gradients["float32"], gradients[None]) <= 1e-5


# Evaluation


@pytest.mark.usefixtures("undrawn")
def test_evaluate_gives_the_errors_of_a_naive_computation(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh)
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
        figures = problem.validation(problem.model)
    held_out = problem.physical(problem.held_out.values).numpy()
    mean = problem.physical(problem.samples.values).numpy().reshape(-1, 2).mean(axis=0)
    with h5py.File(tmp_path / "forecast.h5") as file:
        # The file rounds to float32.
        forecast = file["forecast"][:].astype(float)

    def error(candidate: Any, lead: int) -> float:
        return float(np.sqrt(((candidate - held_out[:, lead]) ** 2).mean()))

    assert [row["lead"] for row in table["rmse"]] == [1, 2, 4]
    for row in table["rmse"]:
        lead = row["lead"]
        assert row["time"] == lead * INTERVAL
        assert row["persistence"] == pytest.approx(error(held_out[:, 0], lead), rel=1e-11)
        assert row["training_mean"] == pytest.approx(error(mean, lead), rel=1e-11)
        assert row["model"] == pytest.approx(error(forecast[:, lead], lead), rel=1e-5)
        assert figures[f"lead_{lead}"] == row["model"]
    squares = [error(forecast[:, lead], lead) ** 2 for lead in range(1, TIMES)]
    assert next(iter(figures)) == "validation_rmse"
    assert figures["validation_rmse"] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-5)
    assert json.loads(json.dumps(table)) == table


@pytest.mark.usefixtures("undrawn")
def test_the_file_holds_truth_and_rollout_with_their_coordinates(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh)
    with torch.no_grad():
        problem.evaluate(problem.model, tmp_path)
    data = xarray.open_dataset(tmp_path / "forecast.h5", engine="h5netcdf")
    assert data.truth.dims == data.forecast.dims == ("trajectory", "time", "y", "x", "species")
    assert data.truth.shape == (VALIDATION, TIMES, NY, NX, 2)
    np.testing.assert_allclose(data.time, np.arange(TIMES) * INTERVAL)
    np.testing.assert_allclose(data.y, np.arange(NY) * DOMAIN[0] / NY)
    np.testing.assert_allclose(data.x, np.arange(NX) * DOMAIN[1] / NX)
    assert [str(name) for name in data.species.to_numpy()] == ["u", "v"]
    initial = data.truth[0, 0].to_numpy().astype(float)
    np.testing.assert_array_equal(data.forecast[0, 0], data.truth[0, 0])
    np.testing.assert_allclose(data.truth[0], trajectory(initial), atol=1e-6)


# What cannot be done


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"evaluation": {"leads": (1, 5)}},
            r"\[evaluation\] leads = \[1, 5\]: must be at most 4, one less than \[problem\] times",
        ),
        ({"problem": {"processes": (2, 1)}}, r"\[problem\] processes: .*must multiply to 1 ranks"),
        ({"trajectory": {"ram": "1KiB"}}, "ram = '1KiB', disk = 0: too small for one checkpoint of 4160 bytes"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_computed(
    mesh: Mesh, tables: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pnode_dist.problems.gray_scott.problem.trajectories", lambda *_: pytest.fail("computed"))
    with pytest.raises(ConfigurationError, match=message):
        built(mesh, **tables)
