"""Watchdog that aborts a hung job after every rank has printed its stacks.

Every rank counts the steps of its solves. A background thread polls this count. If it has not changed for `limit`
seconds, the rank prints the Python stacks of all its threads, and sends a message to the watchdog threads of the other
ranks to do the same. It then aborts all ranks.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
import traceback
from types import TracebackType

from mpi4py import MPI

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.system.abort import HUNG, abort

_LOOKS = 10
_LONGEST_PAUSE = 2.0
_FOR_OTHERS = 3.0


class Watchdog:
    """Context manager that watches this rank for hangs.

    `limit` is in seconds; 0 disables the watchdog. Construction is collective on the world.
    """

    def __init__(self, mesh: Mesh, limit: float) -> None:
        self._rank, self._limit = mesh.rank, limit
        self._pause = min(limit / _LOOKS, _LONGEST_PAUSE)
        self._steps = 0
        together = mesh.size > 1 and MPI.COMM_WORLD.size == mesh.size and limit > 0
        self._world = MPI.COMM_WORLD.Dup() if together else None
        # The thread receives messages while the main thread may be inside MPI, which needs MPI_THREAD_MULTIPLE.
        self._calls = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pnode-dist-watchdog", daemon=True)

    def between_steps(self, comm: MPI.Comm) -> None:
        """See `pnode_dist.ode.safe_points`."""
        self._steps += 1

    def after_solve(self, comm: MPI.Comm) -> None:
        """See `pnode_dist.ode.safe_points`."""
        self._steps += 1

    def progress(self) -> None:
        """Count progress outside solves, such as a look for work that has not come."""
        self._steps += 1

    def _watch(self) -> None:
        steps, since = self._steps, time.monotonic()
        asked = False
        while not self._ended.wait(self._pause):
            now = time.monotonic()
            if self._steps != steps:
                steps, since = self._steps, now
            elif now - since > self._limit:
                self._end(now - since, asked)
            if self._calls and self._world is not None and not asked and self._world.iprobe():
                self._world.recv()
                asked = True
                self._print_stacks(f"got on {now - since:.1f} s ago")

    def _end(self, seconds: float, asked: bool) -> None:
        if not asked:
            self._print_stacks(f"has not got on for {seconds:.1f} s ([run] hang_limit = {self._limit:g})")
        if self._calls and self._world is not None:
            for rank in range(self._world.size):
                if rank != self._rank:
                    self._world.isend(None, rank)
        time.sleep(_FOR_OTHERS + 2 * self._pause)
        if not self._ended.is_set():
            abort(HUNG, self._world)

    def _print_stacks(self, why: str) -> None:
        """Print the stacks of all threads of this rank in one write, the main thread last."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames()
        frames.pop(threading.get_ident(), None)
        lines = [f"{why}:"]
        for number in sorted(frames, key=lambda number: number == threading.main_thread().ident):
            lines.append(f"thread {names.get(number, number)}:")
            lines += "".join(traceback.format_stack(frames[number])).splitlines()
        start = f"[rank {self._rank} on {socket.gethostname()}] "
        sys.stderr.write("".join(f"{start}{line}\n" for line in lines))
        sys.stderr.flush()

    def __enter__(self) -> Watchdog:
        if self._limit > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
