"""The graph diffusion problem spread over ranks: that of the whole mesh, at any number of them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.distributed.gradients import parallel
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.forecast_data import windows
from pnode_dist.problems.graph_diffusion.problem import GraphDiffusionProblem
from pnode_dist.verify.gradcheck import gradcheck
from tests.mpi.agreement import assert_same_on_all_ranks
from tests.unit.problems.graph_diffusion.plain_graph_diffusion import (
    NODES,
    TIMES,
    TRAINING,
    VALIDATION,
    WINDOW,
    config,
    learnt_conductance,
    rollout,
    trajectory,
)

pytestmark = pytest.mark.mpi

STARTS = [(0, 0), (1, 1), (0, 2)]
FLUX = "solve.func.flux.message.network."


@pytest.fixture(scope="module", params=["bisection", "contiguous"])
def problem(mesh: Mesh, request: pytest.FixtureRequest) -> GraphDiffusionProblem:
    """The small problem, split in two ways."""
    return GraphDiffusionProblem(config(problem={"ownership": request.param}), mesh, torch.float64)


def whole_states(problem: GraphDiffusionProblem) -> torch.Tensor:
    """All trajectories `[trajectory, time, node]` in units of the scale, by scipy from the initial states."""
    gathered = problem.partition.gather(torch.cat([problem.samples.values, problem.held_out.values])[:, 0])
    initial: torch.Tensor = problem.partition.comm.bcast(gathered)
    scale = problem.physical(torch.ones(())).item()
    found = [trajectory(problem.nodes, scale * state[:, 0].numpy()) / scale for state in initial]
    return torch.from_numpy(np.stack(found))


def leaves(problem: GraphDiffusionProblem) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(FLUX): value.detach().clone().requires_grad_()
        for name, value in problem.model.named_parameters()
    }


def test_data_and_parameters_are_those_of_the_whole_mesh(problem: GraphDiffusionProblem) -> None:
    states = whole_states(problem)
    assert states.shape == (TRAINING + VALIDATION, TIMES, NODES)
    own = torch.cat([problem.samples.values, problem.held_out.values])[..., 0]
    torch.testing.assert_close(own, states[..., problem.partition.owned], rtol=0, atol=1e-8)
    assert states[:TRAINING].square().mean().item() == pytest.approx(1.0, rel=1e-7)
    assert_same_on_all_ranks(problem.model.parameters())
    assert len(set(MPI.COMM_WORLD.allgather(problem.conductivity))) == 1


def test_loss_and_gradient_are_those_of_the_whole_mesh(problem: GraphDiffusionProblem, mesh: Mesh) -> None:
    model = parallel(problem.model, mesh)
    share = problem.loss(model, windows(problem.samples, STARTS, WINDOW, torch.float64))
    share.backward()  # type: ignore[no-untyped-call]
    gathered = problem.partition.gather(problem.samples.values)
    states: torch.Tensor = problem.partition.comm.bcast(gathered)[..., 0]
    initial = torch.stack([states[start] for start in STARTS])
    targets = torch.stack(
        [torch.stack([states[number, first + lead] for number, first in STARTS]) for lead in range(1, WINDOW + 1)]
    )
    expected = leaves(problem)
    conductance = learnt_conductance(expected, problem.nodes, problem.conductivity)
    loss = (rollout(problem.nodes, initial, WINDOW, conductance) - targets).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert mesh.sum(share).item() == pytest.approx(loss.item(), rel=1e-9)
    for name, value in problem.model.named_parameters():
        torch.testing.assert_close(value.grad, expected[name.removeprefix(FLUX)].grad, rtol=1e-8, atol=1e-12)
        value.grad = None


def test_the_gradient_check_passes_with_the_derivative_of_one_rank(problem: GraphDiffusionProblem, mesh: Mesh) -> None:
    result = gradcheck(problem.gradcheck_case(), mesh)
    assert result.failures() == []
    with Mesh(state=1, data=mesh.size) as replicas:
        one = GraphDiffusionProblem(config(training={"batch_size": mesh.size}), replicas, torch.float64)
        alone = gradcheck(one.gradcheck_case(), replicas)
    assert result.adjoint_derivative == pytest.approx(alone.adjoint_derivative, rel=1e-7)


def test_the_evaluation_is_that_of_the_whole_mesh(problem: GraphDiffusionProblem, directory: Path) -> None:
    with torch.no_grad():
        table = problem.evaluate(problem.model, directory)
        states, scale = whole_states(problem)[TRAINING:], problem.physical(torch.ones(())).item()
        conductance = learnt_conductance(leaves(problem), problem.nodes, problem.conductivity)
        found = rollout(problem.nodes, states[:, 0], TIMES - 1, conductance)
    for row in table["rmse"]:
        lead = row["lead"]
        for name, candidate in (("model", found[lead - 1]), ("persistence", states[:, 0])):
            error = scale * float((candidate - states[:, lead]).square().mean().sqrt())
            assert row[name] == pytest.approx(error, rel=1e-6)
    assert table["heat_drift"] < 1e-13
    assert table["edges_between_ranks"] == problem.partition.edge_cut
    assert all(other == table for other in MPI.COMM_WORLD.allgather(table))
    with h5py.File(directory / "forecast.h5") as file:
        np.testing.assert_allclose(file["truth"][:], scale * states, atol=1e-6)
        np.testing.assert_allclose(file["model"][:, 1:], scale * found.transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_an_unknown_partitioner_is_refused_on_all_ranks(mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=r"^\[problem\] ownership = 'best': must be the owner"):
        GraphDiffusionProblem(config(problem={"ownership": "best"}), mesh, torch.float64)
