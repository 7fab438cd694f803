"""The Gray-Scott problem at every number of ranks: the figures that the whole grid in numpy and plain torch gives."""

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition, Mesh
from pnode_dist.distributed.gradients import parallel
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.forecast_data import windows
from pnode_dist.problems.gray_scott.config import GrayScottParameters
from pnode_dist.problems.gray_scott.data import reference
from pnode_dist.problems.gray_scott.physics import GrayScott, initial_state
from pnode_dist.problems.gray_scott.problem import GrayScottProblem
from pnode_dist.verify.gradcheck import gradcheck
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
    normalisation,
    rates,
    rollout,
    trajectory,
)

pytestmark = pytest.mark.mpi

STARTS, STEP = [(0, 0), (1, 1), (0, 2)], 2.0


@pytest.fixture(scope="module")
def problem(mesh: Mesh) -> GrayScottProblem:
    return GrayScottProblem(config(), mesh, torch.float64)


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    """All trajectories `[trajectory, time, y, x, 2]` as one rank computes them alone."""
    one_rank = GridPartition(MPI.COMM_SELF, (NY, NX), 2, ("periodic", "periodic"))
    equations = GrayScott(one_rank, GrayScottParameters(domain=DOMAIN))
    numbers = range(TRAINING + VALIDATION)
    return torch.stack(
        [reference(equations, initial_state(one_rank, 0, number), TIMES, INTERVAL) for number in numbers]
    )


def own(partition: GridPartition, whole: torch.Tensor) -> torch.Tensor:
    return whole[(..., *partition.owned_slices(partition.comm.rank))]


def leaves(problem: GrayScottProblem) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("solve.func."): value.detach().clone().requires_grad_()
        for name, value in problem.model.named_parameters()
    }


def normalised(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole normalised trajectories, and the rate of their changes."""
    mean, deviation, rate = (torch.from_numpy(value) for value in normalisation(states[:TRAINING].numpy()))
    return (states - mean) / deviation, rate


def test_the_rates_of_the_equations_are_those_of_the_whole_grid(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (NY, NX), 2, ("periodic", "periodic"))
    state = np.random.default_rng(0).uniform(0, 1, (NY, NX, 2))
    equations = GrayScott(partition, GrayScottParameters(domain=DOMAIN))
    found = equations(torch.tensor(0.0), own(partition, torch.from_numpy(state)))
    torch.testing.assert_close(found.detach(), own(partition, torch.from_numpy(rates(state))), rtol=1e-12, atol=1e-14)


def test_initial_states_have_the_same_bits_at_every_number_of_ranks(mesh: Mesh) -> None:
    for shape in ((NY, NX), (65, 131)):
        partition, one_rank = (
            GridPartition(place, shape, 2, ("periodic", "periodic")) for place in (mesh, MPI.COMM_SELF)
        )
        for number in range(3):
            assert torch.equal(initial_state(partition, 7, number), own(partition, initial_state(one_rank, 7, number)))


def test_trajectories_are_those_of_one_rank_to_rounding_and_of_scipy(
    problem: GrayScottProblem, states: torch.Tensor
) -> None:
    found = problem.physical(torch.cat([problem.samples.values, problem.held_out.values]))
    torch.testing.assert_close(found, own(problem.partition, states), rtol=0, atol=1e-12)
    by_scipy = torch.from_numpy(trajectory(states[0, 0].numpy()))
    torch.testing.assert_close(found[0], own(problem.partition, by_scipy), rtol=0, atol=1e-8)


def test_loss_and_gradient_are_those_of_the_whole_grid(
    problem: GrayScottProblem, mesh: Mesh, states: torch.Tensor
) -> None:
    model = parallel(problem.model, mesh)
    share = problem.loss(model, windows(problem.samples, STARTS, WINDOW, torch.float64))
    share.backward()  # type: ignore[no-untyped-call]
    scaled, rate = normalised(states)
    expected = leaves(problem)
    initial = torch.stack([scaled[start] for start in STARTS])
    targets = torch.stack(
        [torch.stack([scaled[number, first + lead] for number, first in STARTS]) for lead in range(1, WINDOW + 1)]
    )
    whole_loss = (rollout(expected, rate, initial, WINDOW, STEP) - targets).square().mean()
    whole_loss.backward()  # type: ignore[no-untyped-call]
    assert mesh.sum(share).item() == pytest.approx(whole_loss.item(), rel=1e-11)
    for name, value in problem.model.named_parameters():
        wanted = expected[name.removeprefix("solve.func.")].grad
        torch.testing.assert_close(value.grad, wanted, rtol=1e-9, atol=1e-12)


def test_the_gradient_check_passes_on_the_loss_of_the_whole_grid(
    problem: GrayScottProblem, mesh: Mesh, states: torch.Tensor
) -> None:
    scaled, rate = normalised(states)
    found = rollout(leaves(problem), rate, scaled[0, :1], WINDOW, STEP)
    expected = (found[:, 0] - scaled[0, 1 : WINDOW + 1]).square().mean().item()
    result = gradcheck(problem.gradcheck_case(), mesh)
    assert result.failures() == []
    assert result.loss == pytest.approx(expected, rel=1e-11)


@pytest.mark.usefixtures("undrawn")
def test_the_evaluation_is_that_of_the_whole_grid(
    problem: GrayScottProblem, directory: Path, states: torch.Tensor
) -> None:
    with torch.no_grad():
        table = problem.evaluate(problem.model, directory)
    scaled, rate = normalised(states)
    mean, deviation, _ = normalisation(states[:TRAINING].numpy())
    with torch.no_grad():
        found = rollout(leaves(problem), rate, scaled[TRAINING:, 0], TIMES - 1, STEP).transpose(0, 1).numpy()
    forecast, truth = found * deviation + mean, states[TRAINING:].numpy()
    for row in table["rmse"]:
        lead = row["lead"]
        for name, candidate in (
            ("model", forecast[:, lead - 1]),
            ("persistence", truth[:, 0]),
            ("training_mean", mean),
        ):
            assert row[name] == pytest.approx(math.sqrt(((candidate - truth[:, lead]) ** 2).mean()), rel=1e-11)
    assert all(other == table for other in MPI.COMM_WORLD.allgather(table))
    with h5py.File(directory / "forecast.h5") as file:
        np.testing.assert_allclose(file["truth"][:], truth, atol=1e-7)
        np.testing.assert_allclose(file["forecast"][:, 1:], forecast, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": (5, 7)}, r"^\[problem\] processes: .*must multiply to"),
        ({"diffusion": (1e9, 1e9)}, r"^\[problem\]: the equations cannot be integrated beyond time 0"),
    ],
)
def test_what_cannot_be_done_is_said_on_all_ranks(mesh: Mesh, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GrayScottProblem(config(problem=changes), mesh, torch.float64)
