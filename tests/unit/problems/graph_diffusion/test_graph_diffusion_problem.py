"""The graph diffusion problem on one rank: data, loss, training, errors, evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from pnode_dist import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.forecast_data import windows
from pnode_dist.problems.graph_diffusion.problem import GraphDiffusionProblem
from pnode_dist.train import loop
from tests.unit.problems.graph_diffusion.plain_graph_diffusion import (
    INTERVAL,
    NODES,
    TIMES,
    TRAINING,
    VALIDATION,
    WINDOW,
    config,
    dense,
    learnt_conductance,
    rate,
    rollout,
    trajectory,
)

STARTS = [(0, 0), (1, 1), (0, 2)]
FLUX = "solve.func.flux.message.network."


def built(mesh: Mesh, **tables: Any) -> GraphDiffusionProblem:
    return GraphDiffusionProblem(config(**tables), mesh, torch.float64)


@pytest.fixture
def problem(mesh: Mesh) -> GraphDiffusionProblem:
    """The small problem."""
    return built(mesh)


def states_of(problem: GraphDiffusionProblem) -> torch.Tensor:
    """All trajectories `[trajectory, time, node]` in units of the scale."""
    return torch.cat([problem.samples.values, problem.held_out.values])[..., 0]


def scale_of(problem: GraphDiffusionProblem) -> float:
    return problem.physical(torch.ones(())).item()


def leaves(problem: GraphDiffusionProblem) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(FLUX): value.detach().clone().requires_grad_()
        for name, value in problem.model.named_parameters()
    }


# Data


def test_the_trajectories_are_those_that_scipy_computes(problem: GraphDiffusionProblem) -> None:
    states = (states_of(problem) * scale_of(problem)).numpy()
    assert states.shape == (TRAINING + VALIDATION, TIMES, NODES)
    for found in states:
        assert np.abs(found[-1] - found[0]).max() > 0.1
        np.testing.assert_allclose(found, trajectory(problem.nodes, found[0]), rtol=0, atol=1e-8)
    assert scale_of(problem) == pytest.approx(np.sqrt((states[:TRAINING] ** 2).mean()), rel=1e-12)


def test_the_constant_conductivity_is_the_least_squares_fit(problem: GraphDiffusionProblem) -> None:
    states = states_of(problem)[:TRAINING].numpy()
    lengths = dense(problem.nodes)
    unit = rate(states, lengths, lambda mean, difference, length: 1 / length**2)
    changes = (np.diff(states, axis=1) / INTERVAL).reshape(-1, 1)
    means = ((unit[:, 1:] + unit[:, :-1]) / 2).reshape(-1, 1)
    ((fitted,),) = np.linalg.lstsq(means, changes, rcond=None)[0]
    assert problem.conductivity == pytest.approx(fitted, rel=1e-10)


def test_the_seed_chooses_the_initial_states_and_another_seed_the_mesh(
    mesh: Mesh, problem: GraphDiffusionProblem
) -> None:
    other, elsewhere = built(mesh, problem={"seed": 1}), built(mesh, problem={"mesh_seed": 1})
    assert not torch.equal(states_of(other), states_of(problem))
    assert np.array_equal(other.nodes.points, problem.nodes.points)
    assert not np.array_equal(elsewhere.nodes.points, problem.nodes.points)


def test_equations_that_cannot_be_integrated_are_refused(mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=r"^\[problem\]: the equations .* beyond time 0: conductivity is too"):
        built(mesh, problem={"conductivity": (1e12, 1e12)})


# Training


def test_loss_and_gradient_are_those_of_dense_matrices(problem: GraphDiffusionProblem) -> None:
    batch = windows(problem.samples, STARTS, WINDOW, torch.float64)
    found = problem.loss(problem.model, batch)
    found.backward()  # type: ignore[no-untyped-call]
    expected = leaves(problem)
    conductance = learnt_conductance(expected, problem.nodes, problem.conductivity)
    whole = rollout(problem.nodes, batch.initial[..., 0], WINDOW, conductance)
    loss = (whole - batch.targets[..., 0]).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(loss.item(), rel=1e-10)
    for name, value in problem.model.named_parameters():
        torch.testing.assert_close(value.grad, expected[name.removeprefix(FLUX)].grad, rtol=1e-9, atol=1e-13)


def test_a_short_training_lowers_loss_and_validation_error(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh, training={"epochs": 12, "learning_rate": 0.02, "validate_every": 1})
    outcome = loop.train(problem, problem.config.training, mesh, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    errors = [record["figures"]["validation_rmse"] for record in records if record["kind"] == "validation"]
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    assert outcome.figures["validation_rmse"] == errors[-1] < errors[0]


# Evaluation


def test_evaluate_gives_the_errors_of_a_naive_computation(problem: GraphDiffusionProblem, tmp_path: Path) -> None:
    nodes = problem.nodes
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
        figures = problem.validation(problem.model)
        states = states_of(problem)[TRAINING:]
        conductance = learnt_conductance(leaves(problem), nodes, problem.conductivity)
        candidates = {
            "model": rollout(nodes, states[:, 0], TIMES - 1, conductance),
            "linear": rollout(nodes, states[:, 0], TIMES - 1, lambda m, d, length: problem.conductivity / length**2),
            "persistence": states[:, 0].expand(TIMES - 1, *states[:, 0].shape),
        }

    def error(name: str, lead: int) -> float:
        return float(scale_of(problem) * (candidates[name][lead - 1] - states[:, lead]).square().mean().sqrt())

    assert [row["lead"] for row in table["rmse"]] == [1, 2, 4]
    for row in table["rmse"]:
        lead = row["lead"]
        assert row["time"] == lead * INTERVAL
        for name in candidates:
            assert row[name] == pytest.approx(error(name, lead), rel=1e-8)
        assert figures[f"lead_{lead}"] == pytest.approx(row["model"], rel=1e-12)
    for name in candidates:
        squares = [error(name, lead) ** 2 for lead in range(1, TIMES)]
        assert table["all_leads"][name] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-8)
    assert next(iter(figures)) == "validation_rmse"
    assert figures["validation_rmse"] == pytest.approx(table["all_leads"]["model"], rel=1e-12)
    assert table["heat_drift"] < 1e-13
    assert table["edges_between_ranks"] == 0
    assert json.loads(json.dumps(table)) == table


def test_the_file_holds_truth_rollouts_mesh_and_conductivities(problem: GraphDiffusionProblem, tmp_path: Path) -> None:
    with torch.no_grad():
        problem.evaluate(problem.model, tmp_path)
    data = xarray.open_dataset(tmp_path / "forecast.h5", engine="h5netcdf")
    scale = scale_of(problem)
    for name in ("truth", "model", "linear", "persistence"):
        assert data[name].dims == ("trajectory", "time", "node")
        assert data[name].shape == (VALIDATION, TIMES, NODES)
        np.testing.assert_array_equal(data[name][:, 0], data.truth[:, 0])
    np.testing.assert_allclose(data.truth, states_of(problem)[TRAINING:] * scale, atol=1e-6)
    np.testing.assert_allclose(data.time, np.arange(TIMES) * INTERVAL)
    np.testing.assert_array_equal(np.stack([data.x, data.y], axis=1), problem.nodes.points)
    np.testing.assert_array_equal(data.edge_index, problem.nodes.edge_index)
    warm = data.temperature.to_numpy()
    assert warm[-1] == pytest.approx(states_of(problem).max().item() * scale)
    np.testing.assert_allclose(data.conductivity_true, 0.01 + 0.08 * warm**2)
    conductance = learnt_conductance(leaves(problem), problem.nodes, problem.conductivity)
    mean_length = torch.tensor(problem.nodes.lengths.mean())
    ends = torch.from_numpy(warm / scale)
    with torch.no_grad():
        expected = conductance(ends, 0 * ends, mean_length) * mean_length**2
    np.testing.assert_allclose(data.conductivity_learnt, expected, rtol=1e-10)
    assert data.conductivity_constant == problem.conductivity


# What cannot be done


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"evaluation": {"leads": (1, 5)}},
            r"\[evaluation\] leads = \[1, 5\]: must be at most 4, one less than \[problem\] times",
        ),
        (
            {"problem": {"ownership": "best"}},
            r"\[problem\] ownership = 'best': must be the owner of each node, or one of bisection, contiguous",
        ),
        ({"trajectory": {"ram": "100B"}}, "too small for one checkpoint"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_computed(
    mesh: Mesh, tables: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pnode_dist.problems.graph_diffusion.problem.trajectories", lambda *_: pytest.fail("computed"))
    with pytest.raises(ConfigurationError, match=message):
        built(mesh, **tables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conductivity": (0.0, 0.0)}, "must not be zero altogether"),
        ({"window": TIMES}, "must be at most 4, one less than times"),
        ({"nodes": 3}, "greater than or equal to 4"),
    ],
)
def test_tables_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(problem=changes)
