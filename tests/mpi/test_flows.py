"""The flows problem on every mesh: the losses, gradients and figures of plain torch for whole batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.distributed.gradients import parallel
from pnode_dist.problems.flows.problem import FlowsProblem
from tests.mpi.agreement import assert_same_on_all_ranks
from tests.mpi.conftest import SPLITS
from tests.unit.problems.flows.plain_flows import config, density, leaves_of, sampled

pytestmark = pytest.mark.mpi

REGULARISED = {"kinetic": 0.3, "jacobian": 0.2}
SIZE, ROWS, SEED = 9, 23, 3


def built(mesh: Mesh, **tables: Any) -> FlowsProblem:
    return FlowsProblem(config(**tables), mesh, torch.float64)


def noise_of(batch: int, count: int) -> torch.Tensor:
    """The signs of a batch of the first epoch."""
    return torch.from_numpy(2.0 * np.random.default_rng([2, SEED, 1, batch]).integers(0, 2, (count, 2)) - 1)


@pytest.mark.parametrize(("state", "data"), SPLITS, ids=[f"{state} x {data}" for state, data in SPLITS])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_losses_and_gradients_are_those_of_whole_batches(state: int, data: int, trace: str) -> None:
    with Mesh(state, data) as mesh:
        problem = built(mesh, model=REGULARISED | {"trace": trace})
        model = parallel(problem.model, mesh)
        order = np.random.default_rng([SEED, 1]).permutation(ROWS)
        batches = list(problem.batches(1))
        for number in (0, 2):
            batch = batches[number]
            rows = order[number * SIZE : (number + 1) * SIZE]
            model.zero_grad()
            share = problem.loss(model, batch)
            share.backward()  # type: ignore[no-untyped-call]
            flows = leaves_of(problem.model)
            noise = noise_of(number, len(rows)) if trace == "hutchinson" else None
            _, found, kinetic, jacobian = density(flows, torch.from_numpy(problem.data.training[rows]), noise)
            whole = (-found + 0.3 * kinetic + 0.2 * jacobian).mean()
            whole.backward()  # type: ignore[no-untyped-call]
            assert mesh.sum(share).item() / data == pytest.approx(whole.item(), rel=1e-11)
            for value, wanted in zip(problem.model.parameters(), flows[0].values(), strict=True):
                torch.testing.assert_close(value.grad, wanted.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("undrawn")
def test_the_evaluation_is_that_of_all_rows(mesh: Mesh, directory: Path) -> None:
    problem = built(mesh)
    with torch.no_grad():
        table = problem.evaluate(problem.model, directory)
        flows, data = leaves_of(problem.model), problem.data
        learnt = density(flows, torch.from_numpy(data.test))[1]
        assert table["log_likelihood"][0]["nats"] == pytest.approx(learnt.mean().item(), rel=1e-10)
        base = torch.from_numpy(np.random.default_rng([3, SEED]).normal(size=(7, 2)))
        samples, drawn = sampled(flows, base)
        back = density(flows, samples)[1]
    assert table["log_density_error"] == pytest.approx((back - drawn).abs().max().item(), rel=1e-4, abs=1e-11)
    assert all(other == table for other in MPI.COMM_WORLD.allgather(table))


def test_a_batch_of_one_sample_less_is_solved_together_where_only_one_rank_has_less(mesh: Mesh) -> None:
    size = 2 * mesh.size
    problem = built(mesh, problem={"samples": 2 * size - 1}, training={"batch_size": size})
    losses = [mesh.sum(problem.loss(problem.model, batch)).item() for batch in problem.batches(1)]
    order = np.random.default_rng([SEED, 1]).permutation(2 * size - 1)
    for rows, loss in zip((order[:size], order[size:]), losses, strict=True):
        whole = -density(leaves_of(problem.model), torch.from_numpy(problem.data.training[rows]))[1].mean()
        assert loss == pytest.approx(whole.item(), rel=1e-11)


def test_a_last_batch_of_fewer_samples_than_ranks_is_shared_all_the_same() -> None:
    with Mesh(1, MPI.COMM_WORLD.size) as mesh:
        problem = built(mesh, problem={"samples": 9}, training={"batch_size": 8})
        model = parallel(problem.model, mesh)
        *_, last = problem.batches(1)
        assert mesh.sum(torch.tensor([len(last.samples)])).item() == 1
        problem.loss(model, last).backward()  # type: ignore[no-untyped-call]
        assert_same_on_all_ranks(value.grad for value in problem.model.parameters())
