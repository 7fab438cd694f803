"""Waits in which a rank sleeps, and the knowledge of all ranks that one of them has failed."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from pnode_dist.system.abort import abort

PATIENCE = 10.0
_FAILED = 1
_SPINS = 200
_SHARE_OF_WAIT, _LONGEST_SLEEP = 1 / 20, 0.01


def sleep_until(test: Callable[[], Any], meanwhile: Callable[[float], None] = lambda waited: None) -> None:
    """Test until it is true. A pause is at most a twentieth of the seconds waited so far, and 10 ms.

    So an idle rank takes next to no processor time, and one that waits for little is hardly late. `meanwhile` is called
    with the seconds before each pause.
    """
    for _ in range(_SPINS):
        if test():
            return
    began = time.monotonic()
    while not test():
        waited = time.monotonic() - began
        meanwhile(waited)
        time.sleep(min(waited * _SHARE_OF_WAIT, _LONGEST_SLEEP))


def failed_anywhere(comm: MPI.Comm, failure: str | None) -> bool:
    """Return True if some rank has failed; `failure` is the reason on this rank, or None. Collective.

    A rank that has failed waits `PATIENCE` seconds for the others, and then ends the job with exit code 1: they are in
    an operation that needs this rank.
    """
    if comm.size == 1:
        return failure is not None
    found = np.array([int(failure is not None)])
    request = comm.Iallreduce(MPI.IN_PLACE, found, MPI.MAX)

    def lose_patience(waited: float) -> None:
        if failure is not None and waited > PATIENCE:
            where = f"[rank {comm.rank} on {socket.gethostname()}]"
            sys.stderr.write(f"{where} failed while the other ranks wait for this one: {failure}\n")
            abort(_FAILED, MPI.COMM_WORLD)

    sleep_until(request.Test, lose_patience)
    return bool(found[0])
