"""A difference that one rank finds in recomputation ends the backward pass of all, with that rank's message."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import BatchPartition, NeuralODE, RecomputationError, Trajectory

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("keep", ["solution", "stages"])
@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_a_difference_on_the_last_rank_is_raised_on_all_ranks(method: str, keep: str, comm: MPI.Comm) -> None:
    array = np.ones(3)
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    solve = NeuralODE(
        lambda t, u: -w * u * torch.tensor(array),
        method=method,
        step_size=0.1,
        params=[w],
        partition=BatchPartition(comm, comm.size, (3,)),
        trajectory=Trajectory(ram="1MiB", keep=keep),
    )
    end = solve(torch.ones(1, 3, dtype=torch.float64), [0.0, 1.0])[-1]
    last = comm.size - 1
    if comm.rank == last:
        array.fill(2.0)
    with pytest.raises(RecomputationError, match=f"on rank {last}" if comm.size > 1 else "recomputed"):
        torch.autograd.grad(end.sum(), w)
