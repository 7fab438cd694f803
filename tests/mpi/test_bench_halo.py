"""The benchmark of halo exchanges counts every message, and knows the least independently of what is exchanged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition
from pnode_dist.bench import halo as bench
from pnode_dist.exchange import halo

pytestmark = pytest.mark.mpi

COMM = MPI.COMM_WORLD
CASES = [
    bench.Case((13, 11), 2, torch.float64, ("periodic", "periodic"), 2),
    bench.Case((12, 15), 3, torch.float32, ("reflect", "periodic"), 1),
    bench.Case((12, 15), 1, torch.float32, (0.5, "replicate"), 2),
    bench.Case((19,), 2, torch.float64, ("periodic",), 2),
    bench.Case((6, 9, 8), 1, torch.float32, ("periodic", "zero", "reflect"), 1),
]


def test_messages_are_counted_and_arrive() -> None:
    counting = bench.CountingComm(COMM)
    sent, received = np.arange(3.0) + counting.rank, np.empty(3)
    request = counting.Isend([sent, MPI.DOUBLE], (counting.rank + 1) % counting.size, 7)
    counting.Recv([received, MPI.DOUBLE], (counting.rank - 1) % counting.size, 7)
    request.Wait()
    assert received[0] == (counting.rank - 1) % counting.size
    assert (counting.messages, counting.bytes) == (1, 24)
    counting.reset()
    assert (counting.messages, counting.bytes) == (0, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_least_is_the_number_of_entries_that_depend_on_other_ranks(case: bench.Case) -> None:
    partition = GridPartition(COMM, case.shape, 1, case.boundary, case.width)
    needs = bench.needs(partition, COMM.rank, case.width)
    # A field whose values name their points, and after them this rank's own: what is left came from others.
    numbers = torch.arange(1.0, 1 + np.prod(case.shape), dtype=torch.float64).reshape(*case.shape, 1)
    own = partition.scatter(numbers)
    padded = halo(own, partition)
    foreign = set(padded.flatten().tolist()) - set(own.flatten().tolist()) - {0.0, 0.5}
    assert needs.points == len(foreign)
    blocks = [set(numbers[partition.owned_slices(rank)].flatten().tolist()) for rank in range(COMM.size)]
    assert needs.ranks == sum(bool(foreign & block) for block in blocks)
    assert needs.faces == sum(
        partition.neighbour(axis, step) not in (MPI.PROC_NULL, COMM.rank)
        for axis in range(len(case.shape))
        for step in (-1, 1)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_sent_covers_what_is_needed_with_one_message_a_face(case: bench.Case) -> None:
    traffic = bench.measure(COMM, case, repeats=2)
    assert traffic.excess == 0
    assert traffic.messages == traffic.faces
    assert traffic.sent == traffic.returned
    assert traffic.sent == traffic.returned == traffic.least
    assert (traffic.least == 0) == (COMM.size == 1)
    assert set(COMM.allgather(traffic.sent)) == {traffic.sent}


def test_a_byte_or_a_message_too_many_fails_its_check() -> None:
    traffic = dataclasses.replace(bench.measure(COMM, CASES[0], repeats=1), sent=80, returned=80, least=80, excess=0)
    assert all(check.holds for check in traffic.checks())
    for change in ({"sent": 81}, {"returned": 79}, {"excess": 1}):
        assert sum(not check.holds for check in dataclasses.replace(traffic, **change).checks()) == 1
