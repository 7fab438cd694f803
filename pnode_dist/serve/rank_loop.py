"""The loop of all ranks: wait for a call from rank 0, compute it together, agree on its outcome.

Ranks that wait sleep, so that they take next to no processor time when idle, and hardly longer when busy.
"""

from __future__ import annotations

import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType

import numpy as np
from mpi4py import MPI

from pnode_dist.distributed.failures import failed_anywhere, sleep_until
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import safe_points
from pnode_dist.serve import protocol
from pnode_dist.serve.abandonment import Abandonment, CallAbandoned
from pnode_dist.serve.protocol import RequestError, Vector
from pnode_dist.serve.queue import Job, JobQueue
from pnode_dist.train.served_model import FailedElsewhere, ServedModel
from pnode_dist.train.watchdog import Watchdog

_SECONDS_BETWEEN_LOOKS = 0.1
_END = 0
_STOP_TAG = 77


class RankLoop:
    """The loop of this rank. Construction, `run` and `close` are collective on the world.

    `queue` is that of rank 0, None on the others. SIGTERM on any rank ends the loop after the jobs that wait, see
    `heeding_signals`.
    """

    def __init__(
        self, comm: MPI.Comm, models: Mapping[str, ServedModel], queue: JobQueue | None, watchdog: Watchdog
    ) -> None:
        self._comm, self._models, self._queue, self._watchdog = comm.Dup(), models, queue, watchdog
        self._stop, self._told = False, False
        self._job: Job | None = None
        self._abandonment = Abandonment(comm, lambda: self._job is not None and self._job.abandoned)

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Record SIGTERM within the context, which begins before any client can know of the service."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._record_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def run(self) -> None:
        """Compute calls until a rank is asked to stop."""
        with ExitStack() as stack:
            stack.enter_context(safe_points.watched(self._watchdog))
            stack.enter_context(safe_points.watched(self._abandonment))
            while (message := self._next()) is not None:
                began = time.monotonic()
                outcome = self._attempt(pickle.loads(message))
                if self._queue is not None and self._job is not None:
                    self._queue.finish(self._job, time.monotonic() - began, outcome)
                    self._job = None

    def close(self) -> None:
        """Free the communicators."""
        self._abandonment.close()
        self._comm.Free()

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def _next(self) -> bytes | None:
        """Return the next call of rank 0, serialised; None to end. Collective."""
        if self._queue is None:
            return self._received()
        while True:
            self._watchdog.progress()
            self._hear_requests_to_stop()
            if self._stop:
                self._queue.close()
            job = self._queue.take(_SECONDS_BETWEEN_LOOKS)
            if job is not None:
                self._job = job
                self._broadcast(job.message)
                return job.message
            if self._queue.is_closed:
                self._broadcast(b"")
                return None

    def _broadcast(self, message: bytes) -> None:
        if self._comm.size > 1:
            self._comm.Ibcast(np.array([len(message)])).Wait()
            if message:
                self._comm.Bcast(np.frombuffer(message, dtype=np.uint8).copy())

    def _received(self) -> bytes | None:
        """Sleep until rank 0 sends a call or the end."""
        size = np.empty(1, dtype=np.int64)
        request = self._comm.Ibcast(size)
        sleep_until(request.Test, self._idle)
        if size[0] == _END:
            return None
        message = np.empty(size[0], dtype=np.uint8)
        self._comm.Bcast(message)
        return message.tobytes()

    def _idle(self, waited: float) -> None:
        self._watchdog.progress()
        if self._stop and not self._told:
            self._told = True
            self._comm.isend(None, 0, _STOP_TAG).wait()

    def _hear_requests_to_stop(self) -> None:
        while self._comm.iprobe(tag=_STOP_TAG):
            self._comm.recv(tag=_STOP_TAG)
            self._stop = True

    def _attempt(self, call: protocol.Call) -> list[Vector] | RequestError:
        """Compute a call, and return the same outcome on all ranks. Collective.

        An error of any rank is the outcome.
        """
        result: list[Vector] = []
        failure: tuple[int, str, str] | None = None
        reason: str | None = None
        self._abandonment.begin()
        try:
            result = protocol.computed(call, self._models)
        except FailedElsewhere as error:
            reason = str(error)
        except CallAbandoned:
            failure = (504, "DeadlineExceeded", "the request was abandoned")
        except ConfigurationError as error:
            failure = (400, "InvalidInput", str(error))
        except ArithmeticError as error:
            # A solve without a solution. Raised on all ranks alike.
            failure = (500, "InvalidOutput", f"{call.model}: {error}")
        except Exception as error:
            failure = (500, "InvalidOutput", f"{call.model}: {type(error).__name__}: {error}")
            sys.stderr.write("".join(traceback.format_exception(error)))
        if not failed_anywhere(self._comm, reason if failure is None else failure[2]):
            return result
        failures = [found for found in self._comm.allgather(failure) if found is not None]
        return RequestError(*failures[0])
