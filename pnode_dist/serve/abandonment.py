"""Ending a computation between two steps of its solve, on all ranks, when rank 0 says that nobody waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

_SECONDS_BETWEEN_EXCHANGES = 0.25
_LARGEST_GROWTH = 4.0


class CallAbandoned(Exception):  # noqa: N818
    """The computation was abandoned on all ranks."""


class Abandonment:
    """Hook between the steps of all solves, see `pnode_dist.ode.safe_points`.

    The ranks exchange their wishes about four times a second. All count the steps alike, and derive the number of steps
    between two exchanges from a time that they have reduced, so short solves make no exchange. `wanted` is called on
    each rank. Construction is collective.
    """

    def __init__(self, comm: MPI.Comm, wanted: Callable[[], bool]) -> None:
        self._comm = comm.Dup()
        self._wanted = wanted
        self._steps, self._steps_until_exchange = 0, 1
        self._last_exchange = time.monotonic()

    def begin(self) -> None:
        """Begin a computation, on all ranks."""
        self._steps, self._last_exchange = 0, time.monotonic()

    def between_steps(self, comm: MPI.Comm) -> None:
        """Raise `CallAbandoned` on all ranks if one of them wants to. Collective on the ranks of the state."""
        if comm.size != self._comm.size:
            return
        self._steps += 1
        if self._steps < self._steps_until_exchange:
            return
        now = time.monotonic()
        found = np.array([now - self._last_exchange, float(self._wanted())])
        self._comm.Allreduce(MPI.IN_PLACE, found, MPI.MAX)
        share = _SECONDS_BETWEEN_EXCHANGES / max(found[0], 1e-9)
        self._steps_until_exchange = max(1, int(self._steps * min(share, _LARGEST_GROWTH)))
        self._steps, self._last_exchange = 0, now
        if found[1]:
            raise CallAbandoned

    def after_solve(self, comm: MPI.Comm) -> None:
        """Do nothing at the end of a pass."""

    def close(self) -> None:
        """Free the communicator. Collective."""
        self._comm.Free()
