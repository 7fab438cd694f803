"""Run work on some ranks while the other ranks sleep and leave their cores free."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from mpi4py import MPI

_NAP = 0.001


def wait_asleep(comm: MPI.Comm) -> None:
    """Wait at a barrier asleep. MPI's own barrier spins and would occupy the core of a working rank. Collective."""
    everyone = comm.Ibarrier()
    while not everyone.Test():
        time.sleep(_NAP)


def on_first(comm: MPI.Comm, ranks: int, work: Callable[[], float]) -> float:
    """Run `work` on the first `ranks` ranks while the others sleep, and return the largest result. Collective."""
    wait_asleep(comm)
    seconds = work() if comm.rank < ranks else 0.0
    wait_asleep(comm)
    largest: float = comm.allreduce(seconds, MPI.MAX)
    return largest


def cores_of(comm: MPI.Comm) -> set[int]:
    """Return the cores available to the ranks of `comm` on this rank's node, empty if unknown. Collective on `comm`."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    cores = set().union(*node.allgather(bound))
    node.Free()
    return cores


@contextmanager
def threads(number: int, cores: set[int]) -> Iterator[None]:
    """Run torch with `number` threads on `cores`, in place of the launcher's core binding. Not collective."""
    before = torch.get_num_threads()
    bound = os.sched_getaffinity(0) if cores else set()
    if cores:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if cores:
            os.sched_setaffinity(0, bound)
