"""The Robertson problem at every number of ranks: the figures that one rank finds, and those of plain torch."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import BatchPartition, Mesh
from pnode_dist.distributed.gradients import parallel
from pnode_dist.problems.common.forecast_data import Windows, windows
from pnode_dist.problems.robertson.physics import AS_PUBLISHED, initial_concentrations, reference
from pnode_dist.problems.robertson.problem import RobertsonProblem
from tests.mpi.agreement import assert_same_on_all_ranks
from tests.unit.problems.robertson.plain_robertson import (
    LOG_TIMES,
    RATES,
    TIMES,
    TRAINING,
    VALIDATION,
    WINDOW,
    config,
    problem_config,
    trapezoidal_rollout,
)

pytestmark = pytest.mark.mpi

# One start before the fast reaction is over, and one where it is a million times faster than the step.
STARTS = (4, 11)


@pytest.fixture(scope="module")
def problem(mesh: Mesh) -> RobertsonProblem:
    """The problem of a small configuration, its equations solved tightly."""
    options = {"snes_rtol": 1e-12, "snes_linesearch_type": "basic", "snes_divergence_tolerance": 1e30}
    return RobertsonProblem(config(solver={"petsc_options": options}), mesh, torch.float64)


@pytest.fixture(scope="module")
def scaled(problem: RobertsonProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """All training and validation trajectories `[time, trajectory, 3]`, computed and scaled here anew."""
    settings = problem_config()
    drawn = np.stack(
        [initial_concentrations(settings.lowest, settings.highest, 0, n) for n in range(TRAINING + VALIDATION - 1)]
    )
    training = reference(drawn[:TRAINING], 10.0**LOG_TIMES, RATES)
    validation = reference(np.stack([AS_PUBLISHED, *drawn[TRAINING:]]), 10.0**LOG_TIMES, RATES)
    lowest = training.min(axis=(0, 1))
    width = training.max(axis=(0, 1)) - lowest
    return torch.from_numpy((training - lowest) / width), torch.from_numpy((validation - lowest) / width)


def leaves(problem: RobertsonProblem) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("solve.func."): value.detach().clone().requires_grad_()
        for name, value in problem.model.named_parameters()
    }


def training_windows(problem: RobertsonProblem) -> Windows:
    return windows(problem.samples, [(0, start) for start in STARTS], WINDOW, torch.float64)


def test_a_rank_has_its_part_of_the_same_trajectories(
    problem: RobertsonProblem, scaled: tuple[torch.Tensor, torch.Tensor]
) -> None:
    for ensemble, whole in zip((problem.samples, problem.held_out), scaled, strict=True):
        begin, end = ensemble.partition.owned
        torch.testing.assert_close(ensemble.values[0], whole[:, begin:end], rtol=1e-12, atol=1e-13)


def test_loss_and_gradient_are_those_of_a_naive_trapezoidal_rule(
    problem: RobertsonProblem, mesh: Mesh, scaled: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = parallel(problem.model, mesh)
    share = problem.loss(model, training_windows(problem))
    share.backward()  # type: ignore[no-untyped-call]
    expected, values = leaves(problem), scaled[0]
    errors = [
        trapezoidal_rollout(expected, problem.model.solve.func.rate, values[start], 10.0 ** LOG_TIMES[start], WINDOW)
        - values[start + 1 : start + 1 + WINDOW]
        for start in STARTS
    ]
    whole = torch.stack(errors).abs().mean()
    whole.backward()  # type: ignore[no-untyped-call]
    assert mesh.sum(share).item() == pytest.approx(whole.item(), rel=1e-9)
    for name, value in problem.model.named_parameters():
        wanted = expected[name.removeprefix("solve.func.")].grad
        torch.testing.assert_close(value.grad, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("undrawn")
def test_the_evaluation_is_that_of_all_trajectories(
    problem: RobertsonProblem, directory: Path, scaled: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with torch.no_grad():
        table = problem.evaluate(problem.model, directory)
    training, validation = scaled
    with torch.no_grad():
        rollout = trapezoidal_rollout(leaves(problem), problem.model.solve.func.rate, validation[0], 1e-5, TIMES - 1)
    candidates = {
        "model": rollout,
        "persistence": validation[:1],
        "training_mean": training[1:].mean(dim=1, keepdim=True),
    }
    for name, values in candidates.items():
        errors = (values - validation[1:]).abs()
        assert table["all_leads"][name] == pytest.approx(errors.mean().item(), rel=1e-6)
        assert table["all_leads_from_1_0_0"][name] == pytest.approx(errors[:, 0].mean().item(), rel=1e-6)
        for row in table["mae"]:
            assert row[name] == pytest.approx(errors[row["lead"] - 1].mean().item(), rel=1e-6)
    assert all(other == table for other in MPI.COMM_WORLD.allgather(table))
    with h5py.File(directory / "forecast.h5") as file:
        lowest, width = problem.physical(torch.tensor([[0.0], [1.0]])).numpy()
        width = width - lowest
        np.testing.assert_allclose(file["truth"][:], validation.numpy() * width + lowest, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(file["forecast"][1:], rollout.numpy() * width + lowest, rtol=1e-5, atol=1e-9)


def test_more_ranks_than_trajectories_leave_some_without_any(mesh: Mesh) -> None:
    problem = RobertsonProblem(config(problem={"trajectories": 1, "validation": 1}), mesh, torch.float64)
    assert isinstance(problem.partition, BatchPartition)
    model = parallel(problem.model, mesh)
    share = problem.loss(model, training_windows(problem))
    share.backward()  # type: ignore[no-untyped-call]
    owned = problem.partition.owned
    assert (share.item() > 0) == (owned[1] > owned[0])
    assert_same_on_all_ranks(value.grad for value in problem.model.parameters())
    assert problem.validation(problem.model)["validation_mae"] > 0
