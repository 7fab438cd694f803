"""The pendulum problem at every number of ranks: the figures that plain torch finds for all trajectories."""

import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.distributed.gradients import parallel
from pnode_dist.problems.common.forecast_data import Windows, windows
from pnode_dist.problems.pendulum.physics import initial_motion
from pnode_dist.problems.pendulum.problem import PendulumProblem
from tests.mpi.agreement import assert_same_on_all_ranks
from tests.unit.problems.pendulum.plain_pendulum import (
    INTERVAL,
    LENGTH,
    TIMES,
    TRAINING,
    VALIDATION,
    WINDOW,
    config,
    motion,
    problem_config,
    trapezoidal_rollout,
)

pytestmark = pytest.mark.mpi

STARTS = (2, 0)


@pytest.fixture(scope="module")
def problem(mesh: Mesh) -> PendulumProblem:
    """The problem of a small configuration, its equations solved tightly."""
    return PendulumProblem(config(solver={"petsc_options": {"snes_rtol": 1e-12}}), mesh, torch.float64)


@pytest.fixture(scope="module")
def trajectories() -> tuple[torch.Tensor, torch.Tensor]:
    """All training and validation trajectories `[time, trajectory, 5]` by scipy."""
    settings = problem_config()
    starts = [
        initial_motion(settings.largest_angle, settings.largest_speed, LENGTH, 0, number)
        for number in range(TRAINING + VALIDATION)
    ]
    found = torch.from_numpy(np.stack([motion(*start, np.arange(TIMES) * INTERVAL) for start in starts], axis=1))
    return found[:, :TRAINING], found[:, TRAINING:]


def leaves(problem: PendulumProblem) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("solve.func.force."): value.detach().clone().requires_grad_()
        for name, value in problem.model.named_parameters()
    }


def training_windows(problem: PendulumProblem) -> Windows:
    return windows(problem.samples, [(0, start) for start in STARTS], WINDOW, torch.float64)


def test_a_rank_has_its_part_of_the_same_trajectories(
    problem: PendulumProblem, trajectories: tuple[torch.Tensor, torch.Tensor]
) -> None:
    for ensemble, whole in zip((problem.samples, problem.held_out), trajectories, strict=True):
        begin, end = ensemble.partition.owned
        torch.testing.assert_close(ensemble.values[0], whole[:, begin:end], rtol=0, atol=1e-9)
    mean = trajectories[0].mean(dim=(0, 1))
    torch.testing.assert_close(problem.motions.mean, mean, rtol=1e-8, atol=1e-9)


def test_loss_and_gradient_are_those_of_the_motion_without_the_tension(
    problem: PendulumProblem, mesh: Mesh, trajectories: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = parallel(problem.model, mesh)
    share = problem.loss(model, training_windows(problem))
    share.backward()  # type: ignore[no-untyped-call]
    expected, values = leaves(problem), trajectories[0]
    errors = [
        trapezoidal_rollout(expected, problem.motions, values[start], WINDOW, 2)
        - values[start + 1 : start + 1 + WINDOW]
        for start in STARTS
    ]
    whole = (torch.stack(errors) / problem.motions.deviation).square().mean()
    whole.backward()  # type: ignore[no-untyped-call]
    assert mesh.sum(share).item() == pytest.approx(whole.item(), rel=1e-8)
    for name, value in problem.model.named_parameters():
        wanted = expected[name.removeprefix("solve.func.force.")].grad
        torch.testing.assert_close(value.grad, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("undrawn")
def test_the_evaluation_is_that_of_all_trajectories(
    problem: PendulumProblem, directory: Path, trajectories: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with torch.no_grad():
        table = problem.evaluate(problem.model, directory)
    validation = trajectories[1]
    with torch.no_grad():
        rollout = trapezoidal_rollout(leaves(problem), problem.motions, validation[0], TIMES - 1, 2)
    candidates = {"model": rollout, "persistence": validation[:1], "training_mean": problem.motions.mean}
    for name, values in candidates.items():
        squares = ((values - validation[1:]) / problem.motions.deviation).square()
        assert table["all_leads"][name] == pytest.approx(math.sqrt(squares.mean().item()), rel=1e-6)
        for row in table["rmse"]:
            assert row[name] == pytest.approx(math.sqrt(squares[row["lead"] - 1].mean().item()), rel=1e-6)
    stretch = (rollout[..., :2].norm(dim=-1) / LENGTH - 1).abs().max().item()
    assert table["drift"]["length"] == pytest.approx(stretch, rel=1e-5)
    assert all(other == table for other in MPI.COMM_WORLD.allgather(table))
    with h5py.File(directory / "forecast.h5") as file:
        np.testing.assert_allclose(file["truth"][:], validation.numpy(), rtol=0, atol=1e-9)
        np.testing.assert_allclose(file["forecast"][1:], rollout.numpy(), rtol=0, atol=1e-6)


def test_more_ranks_than_trajectories_leave_some_without_any(mesh: Mesh) -> None:
    problem = PendulumProblem(config(problem={"trajectories": 1, "validation": 1}), mesh, torch.float64)
    model = parallel(problem.model, mesh)
    share = problem.loss(model, training_windows(problem))
    share.backward()  # type: ignore[no-untyped-call]
    owned = problem.partition.owned
    assert (share.item() > 0) == (owned[1] > owned[0])
    assert_same_on_all_ranks(value.grad for value in problem.model.parameters())
    assert problem.validation(problem.model)["validation_rmse"] > 0
