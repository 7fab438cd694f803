"""Stopping a run when it is asked to: SIGTERM or SIGUSR1 on any rank, or the end of the job's time.

A rank that is asked only takes note. All ranks learn of it from the sum that every optimiser step makes anyway, and
stop after that step. So that it does not take as long as a long step, the ranks of a state also ask each other between
the steps of a solve, about twice a second: each solve counts its steps alike on all its ranks, and how many of them
pass between two questions follows from a time that they have agreed on. If one was asked to stop, the optimiser step is
given up, and the run stops as it was before it.

Replicas take steps of their own: they vote at the end of every pass of a solve, where they would wait for each other
next, and one that gives up casts its vote at once and waits for theirs. It tells them by a message, so that they need
not come to the end of their passes either.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from mpi4py import MPI

from pnode_dist.distributed.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_BETWEEN_QUESTIONS = 0.5
_FASTER = 4


class GivenUp(Exception):  # noqa: N818
    """The solve under way was given up, on all ranks, because the run is to stop."""


class Preemption:
    """Takes note of requests to stop, from signals and, on rank 0, from the time: while it is entered.

    `end` is when to stop, in seconds since the epoch. Making and closing it is collective on the world.
    """

    def __init__(self, mesh: Mesh, end: float | None = None) -> None:
        self._mesh, self._end = mesh, end
        self._reason: str | None = None
        self._heard = False
        self._before: dict[signal.Signals, Any] = {}
        self._ranks = mesh.state_comm.Dup()
        self._world = MPI.COMM_WORLD.Dup() if mesh.data_replicas > 1 and mesh.size == MPI.COMM_WORLD.size else None
        self._told: list[MPI.Request] = []
        self._steps, self._until_question = 0, 1
        self._asked = time.monotonic()

    @property
    def wanted(self) -> bool:
        """Whether this rank knows of a request to stop."""
        if self._reason is None and self._end is not None and time.time() >= self._end:
            self._reason = "the end of the job's time"
        return self._heard or self._reason is not None

    def reason(self) -> str:
        """Who was asked to stop, and how, the same on all ranks. Collective on the world."""
        own = f"{self._reason} on rank {self._mesh.rank} ({socket.gethostname()})" if self._reason else None
        reasons = [reason for reason in self._mesh.gather_object(own) or () if reason is not None]
        found: str = self._mesh.broadcast_object(next(iter(reasons), "a request"))
        return found

    def between_steps(self, comm: MPI.Comm) -> None:
        """See `pnode_dist.ode.safe_points`. Raises `GivenUp` on all ranks once one was asked to stop."""
        if comm.size != self._ranks.size:
            return
        self._steps += 1
        if self._steps < self._until_question:
            return
        now = time.monotonic()
        self._hear()
        seconds, wanted = self._ranks.allreduce((now - self._asked, self.wanted), _both_largest)
        share = _BETWEEN_QUESTIONS / max(seconds, 1e-9)
        self._until_question = max(1, int(self._steps * min(share, _FASTER)))
        self._steps, self._asked = 0, now
        if wanted:
            self._vote()
            raise GivenUp

    def after_solve(self, comm: MPI.Comm) -> None:
        """See `pnode_dist.ode.safe_points`. Raises `GivenUp` on all ranks if a replica has given up."""
        if comm.size == self._ranks.size and self._world is not None and self._vote():
            raise GivenUp

    def _vote(self) -> bool:
        """Whether some rank wants to stop. Collective on the world."""
        if self._world is None:
            return self.wanted
        self._tell()
        stop: bool = self._world.allreduce(self.wanted, MPI.LOR)
        return stop

    def _tell(self) -> None:
        """Let ranks of other replicas know, once."""
        if self._world is not None and self._reason is not None and not self._told:
            others = [rank for rank in range(self._world.size) if rank != self._world.rank]
            self._told = [self._world.isend(None, rank) for rank in others]

    def _hear(self) -> None:
        if self._world is not None:
            self._tell()
            if self._world.iprobe():
                self._world.recv()
                self._heard = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._ranks.Free()


def _both_largest(one: tuple[float, bool], other: tuple[float, bool]) -> tuple[float, bool]:
    return max(one[0], other[0]), one[1] or other[1]
