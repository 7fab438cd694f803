"""Preemption of a run: by SIGTERM or SIGUSR1 on any rank, or at the end of the job's time.

A rank that receives a request only records it. The reduction of every optimiser step carries the requests to all
ranks, which stop after that step. To respond within a long step, the ranks of a state also exchange requests between
the steps of a solve, about twice a second. All ranks of a solve count its steps identically, and they derive the
number of steps between two exchanges from an elapsed time reduced over them. On a request, the optimiser step is
abandoned, and the run stops in the state before it.

Replicas take different numbers of solve steps. They vote at the end of every pass of a solve, before the next
synchronisation between replicas. A replica that abandons its solve votes at once and waits for the others. It also
sends them a message, so that they can abandon their solves before the end of the pass.
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
_SECONDS_BETWEEN_EXCHANGES = 0.5
_LARGEST_GROWTH = 4


class SolveAbandoned(Exception):  # noqa: N818
    """The current solve was abandoned on all ranks because of a request to stop."""


class Preemption:
    """Context manager that records requests to stop, from signals and from the time limit.

    `end` is the time to stop, in seconds since the epoch; None sets no limit. Construction and exit are collective on
    the world.
    """

    def __init__(self, mesh: Mesh, end: float | None = None) -> None:
        self._mesh, self._end = mesh, end
        self._reason: str | None = None
        self._received = False
        self._before: dict[signal.Signals, Any] = {}
        self._ranks = mesh.state_comm.Dup()
        self._world = MPI.COMM_WORLD.Dup() if mesh.data_replicas > 1 and mesh.size == MPI.COMM_WORLD.size else None
        self._sent: list[MPI.Request] = []
        self._steps, self._steps_until_exchange = 0, 1
        self._last_exchange = time.monotonic()

    @property
    def wanted(self) -> bool:
        """True if this rank has received a request to stop."""
        if self._reason is None and self._end is not None and time.time() >= self._end:
            self._reason = "the end of the job's time"
        return self._received or self._reason is not None

    def reason(self) -> str:
        """Describe the request of the lowest rank that received one; the same text on all ranks.

        Collective on the world.
        """
        own = f"{self._reason} on rank {self._mesh.rank} ({socket.gethostname()})" if self._reason else None
        reasons = [reason for reason in self._mesh.gather_object(own) or () if reason is not None]
        found: str = self._mesh.broadcast_object(next(iter(reasons), "a request"))
        return found

    def between_steps(self, comm: MPI.Comm) -> None:
        """See `pnode_dist.ode.safe_points`. Raises `SolveAbandoned` on all ranks after a request to any of them."""
        if comm.size != self._ranks.size:
            return
        self._steps += 1
        if self._steps < self._steps_until_exchange:
            return
        now = time.monotonic()
        self._receive_request()
        seconds, wanted = self._ranks.allreduce((now - self._last_exchange, self.wanted), _maximum_of_both)
        share = _SECONDS_BETWEEN_EXCHANGES / max(seconds, 1e-9)
        self._steps_until_exchange = max(1, int(self._steps * min(share, _LARGEST_GROWTH)))
        self._steps, self._last_exchange = 0, now
        if wanted:
            self._vote()
            raise SolveAbandoned

    def after_solve(self, comm: MPI.Comm) -> None:
        """See `pnode_dist.ode.safe_points`. Raises `SolveAbandoned` on all ranks if a replica has."""
        if comm.size == self._ranks.size and self._world is not None and self._vote():
            raise SolveAbandoned

    def _vote(self) -> bool:
        """Return True if any rank has a request to stop. Collective on the world."""
        if self._world is None:
            return self.wanted
        self._send_request()
        stop: bool = self._world.allreduce(self.wanted, MPI.LOR)
        return stop

    def _send_request(self) -> None:
        """Send a request received on this rank to all other ranks, once."""
        if self._world is not None and self._reason is not None and not self._sent:
            others = [rank for rank in range(self._world.size) if rank != self._world.rank]
            self._sent = [self._world.isend(None, rank) for rank in others]

    def _receive_request(self) -> None:
        if self._world is not None:
            self._send_request()
            if self._world.iprobe():
                self._world.recv()
                self._received = True

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._record_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._ranks.Free()


def _maximum_of_both(one: tuple[float, bool], other: tuple[float, bool]) -> tuple[float, bool]:
    return max(one[0], other[0]), one[1] or other[1]
