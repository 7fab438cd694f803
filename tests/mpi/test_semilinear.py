"""The semilinear problems at every number of ranks: the figures that the whole line in plain torch gives."""

import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition, Mesh
from pnode_dist.distributed.gradients import parallel
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.forecast_data import windows
from pnode_dist.problems.semilinear.data import reference
from pnode_dist.problems.semilinear.equation import Convection, initial_state, linear_stencil
from pnode_dist.problems.semilinear.periodic_line import line, operator
from pnode_dist.problems.semilinear.problem import SemilinearProblem
from tests.unit.problems.semilinear.plain_semilinear import (
    CASES,
    POINTS,
    TIMES,
    TRAINING,
    VALIDATION,
    WINDOW,
    config,
    convection,
    linear_matrix,
    problem_config,
    rollout,
    term,
)

pytestmark = pytest.mark.mpi

STARTS = [(0, 0), (1, 1), (0, 2)]


@pytest.fixture(scope="module", params=CASES)
def problem(mesh: Mesh, request: pytest.FixtureRequest) -> SemilinearProblem:
    return SemilinearProblem(config(request.param), mesh, torch.float64)


@pytest.fixture
def few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """How exactly the largest stable step is found does not matter here."""
    monkeypatch.setattr("pnode_dist.problems.semilinear.stable_step.STEPS", 60)


@pytest.fixture(scope="module")
def states(problem: SemilinearProblem) -> torch.Tensor:
    """All trajectories `[trajectory, time, point]` as one rank computes them alone."""
    table = problem_config(problem.name)
    return torch.stack(
        [
            reference(
                table.equation,
                torch.from_numpy(initial_state(table.equation, POINTS, 0, number)),
                TIMES,
                table.interval,
                table.spin_up,
            )
            for number in range(TRAINING + VALIDATION)
        ]
    )


def own(partition: GridPartition, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part `[..., points_local, 1]` of whole states `[..., point]`."""
    return whole[..., slice(*partition.owned[0]), None]


def leaves(problem: SemilinearProblem) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("term."): value.detach().clone().requires_grad_()
        for name, value in problem.model.named_parameters()
    }


def test_the_matrix_and_the_convection_are_those_of_the_whole_line(mesh: Mesh) -> None:
    partition = line(mesh, POINTS)
    states = np.random.default_rng(0).standard_normal((3, POINTS))
    for name in CASES:
        equation = problem_config(name).equation
        matrix = operator(partition, linear_stencil(equation, POINTS), 3)
        source, target = matrix.createVecs()
        source.setArray(own(partition, torch.from_numpy(states)).numpy().ravel())
        matrix.mult(source, target)
        expected = own(partition, torch.from_numpy(states @ linear_matrix(name).T)).numpy().ravel()
        np.testing.assert_allclose(target.getArray(), expected, rtol=1e-10, atol=1e-9)
        found = Convection(partition, equation.length)(torch.tensor(0.0), own(partition, torch.from_numpy(states)))
        torch.testing.assert_close(
            found, own(partition, torch.from_numpy(convection(name, states))), rtol=1e-12, atol=1e-12
        )


def test_trajectories_have_the_same_bits_at_every_number_of_ranks(
    problem: SemilinearProblem, states: torch.Tensor
) -> None:
    assert problem.scale == states[:TRAINING].square().mean().sqrt().item()
    found = torch.cat([problem.samples.values, problem.held_out.values])
    assert torch.equal(found, own(problem.partition, states) / problem.scale)


def test_loss_and_gradient_are_those_of_the_whole_line(
    problem: SemilinearProblem, mesh: Mesh, states: torch.Tensor
) -> None:
    model = parallel(problem.model, mesh)
    share = problem.loss(model, windows(problem.samples, STARTS, WINDOW, torch.float64))
    share.backward()  # type: ignore[no-untyped-call]
    scaled = states / problem.scale
    expected = leaves(problem)
    initial = torch.stack([scaled[start] for start in STARTS])
    targets = torch.stack(
        [torch.stack([scaled[number, first + lead] for number, first in STARTS]) for lead in range(1, WINDOW + 1)]
    )
    found = rollout(problem.name, lambda u: term(problem.name, expected, problem.scale, u), initial, WINDOW)
    whole_loss = (found - targets).square().mean()
    whole_loss.backward()  # type: ignore[no-untyped-call]
    assert mesh.sum(share).item() == pytest.approx(whole_loss.item(), rel=1e-9)
    for name, value in problem.model.named_parameters():
        torch.testing.assert_close(value.grad, expected[name.removeprefix("term.")].grad, rtol=1e-8, atol=1e-12)


@pytest.mark.usefixtures("few_trials", "undrawn")
def test_the_evaluation_is_that_of_the_whole_line(
    problem: SemilinearProblem, directory: Path, states: torch.Tensor
) -> None:
    with torch.no_grad():
        table = problem.evaluate(problem.model, directory)
    scale = problem.scale
    states = states[TRAINING:]
    with torch.no_grad():
        expected = leaves(problem)
        found = scale * rollout(
            problem.name, lambda u: term(problem.name, expected, scale, u), states[:, 0] / scale, TIMES - 1
        )
    for row in table["rmse"]:
        lead = row["lead"]
        for name, candidate in (("model", found[lead - 1]), ("persistence", states[:, 0])):
            error = math.sqrt((candidate - states[:, lead]).square().mean())
            assert row[name] == pytest.approx(error, rel=1e-8)
    assert all(other == table for other in MPI.COMM_WORLD.allgather(table))
    with h5py.File(directory / "forecast.h5") as file:
        np.testing.assert_allclose(file["truth"][:], states, atol=1e-6)
        np.testing.assert_allclose(file["model"][:, 1:], found.transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_integrated_is_said_on_all_ranks(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pnode_dist.problems.semilinear.data._MOST_STEPS", 300)
    changes = {"viscosity": 1e-7, "interval": 10.0}
    with pytest.raises(ConfigurationError, match=r"^\[problem\]: the viscous Burgers equation on 36 points cannot"):
        SemilinearProblem(config("burgers", problem=changes), mesh, torch.float64)


def test_too_many_ranks_for_the_halo_are_refused_on_all(mesh: Mesh) -> None:
    ranks = MPI.COMM_WORLD.size
    kernel = 2 * (POINTS // ranks + 1) + 1
    with pytest.raises(
        ConfigurationError, match=rf"^\[mesh\] state = {ranks}: a line of 36 points cannot be split over"
    ):
        SemilinearProblem(config("burgers", model={"kernel_size": kernel}), mesh, torch.float64)
