"""The semilinear problems on one rank: loss, training, errors, evaluation."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from pnode_dist import Mesh, Trajectory
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.forecast_data import windows
from pnode_dist.problems.semilinear.problem import SemilinearProblem
from pnode_dist.train import loop
from tests.unit.problems.semilinear.plain_semilinear import (
    CASES,
    POINTS,
    TIMES,
    VALIDATION,
    WINDOW,
    config,
    convection,
    linear_matrix,
    rollout,
    term,
)

STARTS = [(0, 0), (1, 1), (0, 2)]


@pytest.fixture
def few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """How exactly the largest stable step is found does not matter here."""
    monkeypatch.setattr("pnode_dist.problems.semilinear.stable_step.STEPS", 60)


def built(mesh: Mesh, name: str, **tables: Any) -> SemilinearProblem:
    return SemilinearProblem(config(name, **tables), mesh, torch.float64)


def states_of(problem: SemilinearProblem) -> torch.Tensor:
    """The validation trajectories `[trajectory, time, point]` in units of the scale."""
    return problem.held_out.values[..., 0]


def euler(
    name: str, explicit: Callable[[torch.Tensor], torch.Tensor], initial: torch.Tensor, leads: int, longest: float
) -> torch.Tensor:
    """The states `[window, 1 + lead, point]` by Euler's method with steps no longer than `longest`."""
    interval, matrix = CASES[name]["interval"], torch.from_numpy(linear_matrix(name))
    steps = math.ceil(interval / longest)
    state, found = initial, [initial]
    for _ in range(leads):
        for _ in range(steps):
            state = state + interval / steps * (state @ matrix.T + explicit(state))
        found.append(state)
    return torch.stack(found, dim=1)


# Training


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_dense_semi_implicit_steps(mesh: Mesh, name: str) -> None:
    problem = built(mesh, name)
    batch = windows(problem.samples, STARTS, WINDOW, torch.float64)
    found = problem.loss(problem.model, batch)
    found.backward()  # type: ignore[no-untyped-call]
    leaves = {
        key.removeprefix("term."): value.detach().clone().requires_grad_()
        for key, value in problem.model.named_parameters()
    }
    whole = rollout(name, lambda u: term(name, leaves, problem.scale, u), batch.initial[..., 0], WINDOW)
    expected = (whole - batch.targets[..., 0]).square().mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    for key, value in problem.model.named_parameters():
        torch.testing.assert_close(value.grad, leaves[key.removeprefix("term.")].grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_short_training_lowers_loss_and_validation_error(mesh: Mesh, tmp_path: Path, name: str) -> None:
    problem = built(mesh, name, training={"epochs": 8, "learning_rate": 0.02, "validate_every": 1})
    outcome = loop.train(problem, problem.config.training, mesh, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    errors = [record["figures"]["validation_rmse"] for record in records if record["kind"] == "validation"]
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    assert outcome.figures["validation_rmse"] == errors[-1] < errors[0]


def test_the_configured_solver_is_the_one_that_solves(mesh: Mesh) -> None:
    chosen = {"method": "arkimex_4", "step_size": 0.25}
    problem = built(mesh, "kuramoto_sivashinsky", solver=chosen, trajectory={"ram": "1MiB"})
    solve = problem.model.solve_of(2)
    assert {name: getattr(solve, name) for name in chosen} == chosen
    assert solve.trajectory == Trajectory(ram="1MiB")
    assert solve.options == {"snes_type": "ksponly", "ksp_type": "preonly", "pc_type": "redundant"}
    assert problem.loss(problem.model, next(problem.batches(1))).isfinite()
    assert problem.solve_statistics().forward_steps == WINDOW * 2


def test_every_number_of_windows_is_solved_with_the_same_parameters(mesh: Mesh) -> None:
    problem = built(mesh, "burgers")
    with torch.no_grad():
        together = problem.model(windows(problem.samples, STARTS, WINDOW, torch.float64))
        for number, start in enumerate(STARTS):
            alone = problem.model(windows(problem.samples, [start], WINDOW, torch.float64))
            torch.testing.assert_close(alone[:, 0], together[:, number], rtol=1e-12, atol=1e-13)
    assert len({id(value) for value in problem.model.parameters()}) == len(list(problem.model.term.parameters()))


# Evaluation


@pytest.mark.usefixtures("few_trials", "undrawn")
@pytest.mark.parametrize("name", CASES)
def test_evaluate_gives_the_errors_of_a_naive_computation(mesh: Mesh, tmp_path: Path, name: str) -> None:
    problem = built(mesh, name)
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
        figures = problem.validation(problem.model)
        states, scale = states_of(problem), problem.scale
        leaves = {key.removeprefix("term."): value for key, value in problem.model.named_parameters()}
        model = rollout(name, lambda u: term(name, leaves, problem.scale, u), states[:, 0], TIMES - 1)
        equation = rollout(name, lambda u: convection(name, u, scale), states[:, 0], TIMES - 1)
        (step,) = (row["largest_step"] for row in table["costs"] if row["rollout"] == "explicit")
        explicit = euler(name, lambda u: term(name, leaves, scale, u), states[:, 0], TIMES - 1, step)

    def error(candidate: torch.Tensor, lead: int) -> float:
        return float(scale * (candidate - states[:, lead]).square().mean().sqrt())

    assert [row["lead"] for row in table["rmse"]] == [1, 2, 4]
    for row in table["rmse"]:
        lead = row["lead"]
        assert row["time"] == lead * CASES[name]["interval"]
        assert row["model"] == pytest.approx(error(model[lead - 1], lead), rel=1e-8)
        assert row["equation"] == pytest.approx(error(equation[lead - 1], lead), rel=1e-5)
        assert row["persistence"] == pytest.approx(error(states[:, 0], lead), rel=1e-11)
        assert row["explicit"] == pytest.approx(error(explicit[:, lead], lead), rel=1e-6)
        assert figures[f"lead_{lead}"] == pytest.approx(row["model"], rel=1e-12)
    squares = [error(model[lead - 1], lead) ** 2 for lead in range(1, TIMES)]
    assert next(iter(figures)) == "validation_rmse"
    assert figures["validation_rmse"] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-8)
    assert table["deviation"] == scale
    assert json.loads(json.dumps(table)) == table


@pytest.mark.usefixtures("undrawn")
def test_the_costs_are_those_of_the_steps_taken(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh, "kuramoto_sivashinsky")
    with torch.no_grad():
        costs = {row["rollout"]: row for row in problem.evaluate(problem.model, tmp_path)["costs"]}
    span = (TIMES - 1) * CASES["kuramoto_sivashinsky"]["interval"]
    for name, method in (("model", "arkimex_3"), ("explicit", "euler"), ("equation", "arkimex_3")):
        assert costs[name]["method"] == method
        assert costs[name]["steps"] == pytest.approx(span / costs[name]["largest_step"], rel=0.3)
    # The eigenvalue of the shortest wave, over the real interval of stability of the explicit method.
    spacing = CASES["kuramoto_sivashinsky"]["length"] / POINTS
    assert costs["explicit"]["largest_step"] == pytest.approx(2 / (16 / spacing**4 - 4 / spacing**2), rel=0.05)


@pytest.mark.usefixtures("few_trials", "undrawn")
def test_the_file_holds_truth_and_rollouts_with_their_coordinates(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh, "burgers")
    with torch.no_grad():
        problem.evaluate(problem.model, tmp_path)
    data = xarray.open_dataset(tmp_path / "forecast.h5", engine="h5netcdf")
    assert set(data.data_vars) == {"truth", "model", "explicit", "equation", "persistence"}
    for values in data.data_vars.values():
        assert values.dims == ("trajectory", "time", "x")
        assert values.shape == (VALIDATION, TIMES, POINTS)
        np.testing.assert_array_equal(values[:, 0], data.truth[:, 0])
    np.testing.assert_allclose(data.time, np.arange(TIMES) * CASES["burgers"]["interval"])
    np.testing.assert_allclose(data.x, np.arange(POINTS) / POINTS)
    np.testing.assert_allclose(data.truth, states_of(problem) * problem.scale, atol=1e-6)


# What cannot be done


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"evaluation": {"leads": (1, 5)}},
            r"\[evaluation\] leads = \[1, 5\]: must be at most 4, one less than \[problem\] times",
        ),
        ({"model": {"kernel_size": 75}}, r"\[mesh\] state = 1: a line of 36 points cannot be split over 1 rank"),
        ({"trajectory": {"ram": "100B"}}, "too small for one checkpoint"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_computed(
    mesh: Mesh, tables: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pnode_dist.problems.semilinear.problem.generate", lambda *_: pytest.fail("computed"))
    with pytest.raises(ConfigurationError, match=message):
        built(mesh, "burgers", **tables)
