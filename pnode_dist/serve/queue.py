"""The bounded queue between the threads that receive requests and the ranks that compute them, in the order received.

A thread puts a job and waits for its outcome. The main thread of rank 0 takes one job after the other, and no thread
but that one makes calls of MPI. A thread abandons its job when the client is gone or the deadline has passed.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence

from pnode_dist.serve.protocol import Call, RequestError, Vector

_LONGEST_RETRY = 3600
_SHARE_OF_LAST = 0.2


class Job:
    """A call that waits to be computed, `message` being its serialised form for the other ranks.

    `abandoned` says that nobody waits for the outcome any more. `seconds` is the time that the ranks computed.
    """

    def __init__(self, call: Call, message: bytes) -> None:
        self.call, self.message = call, message
        self.abandoned = False
        self.seconds = 0.0
        self._outcome: Sequence[Vector] | RequestError | None = None
        self._done = threading.Event()

    def finish(self, outcome: Sequence[Vector] | RequestError) -> None:
        """Set the outcome, unless there is one already, and wake the thread that waits for it."""
        if not self._done.is_set():
            self._outcome = outcome
            self._done.set()

    def wait(self, seconds: float) -> bool:
        """Wait at most so many seconds. Returns True if there is an outcome."""
        return self._done.wait(seconds)

    def result(self) -> Sequence[Vector]:
        """Return the computed vectors. Raises the job's `RequestError`."""
        assert self._outcome is not None
        if isinstance(self._outcome, RequestError):
            raise self._outcome
        return self._outcome


class JobQueue:
    """Jobs in the order received, at most `capacity` of them waiting."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._usual_seconds = 0.0

    @property
    def length(self) -> int:
        """Number of jobs that wait."""
        return len(self._waiting)

    @property
    def is_busy(self) -> bool:
        """True while a job is computed."""
        return self._current is not None

    @property
    def is_closed(self) -> bool:
        """True if no more jobs are accepted."""
        return self._closed

    def put(self, job: Job) -> None:
        """Add a job. Raises `RequestError` with status 503 if the queue is full or closed."""
        with self._changed:
            if self._closed:
                raise RequestError(503, "ServiceUnavailable", "the service is ending", {"Retry-After": "60"})
            if len(self._waiting) >= self._capacity:
                self._waiting = deque(other for other in self._waiting if not other.abandoned)
            if len(self._waiting) >= self._capacity:
                seconds = min(max(1, math.ceil(len(self._waiting) * self._usual_seconds)), _LONGEST_RETRY)
                raise RequestError(
                    503,
                    "ServiceUnavailable",
                    f"{len(self._waiting)} requests are waiting, which is the most: try again in {seconds} s",
                    {"Retry-After": str(seconds)},
                )
            self._waiting.append(job)
            self._changed.notify()

    def take(self, seconds: float) -> Job | None:
        """Remove the next job that is not abandoned; None if there is none within so many seconds."""
        until = time.monotonic() + seconds
        with self._changed:
            while True:
                while self._waiting:
                    job = self._waiting.popleft()
                    if not job.abandoned:
                        self._current = job
                        return job
                left = until - time.monotonic()
                if left <= 0 or self._closed:
                    return None
                self._changed.wait(left)

    def finish(self, job: Job, seconds: float, outcome: Sequence[Vector] | RequestError) -> None:
        """Set the outcome of the job taken last, computed in so many seconds."""
        job.seconds = seconds
        last = seconds if self._usual_seconds == 0 else self._usual_seconds
        self._usual_seconds = (1 - _SHARE_OF_LAST) * last + _SHARE_OF_LAST * seconds
        self._current = None
        job.finish(outcome)

    def close(self) -> None:
        """Accept no more jobs. Those that wait are still taken."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def fail_all(self, error: RequestError) -> None:
        """Accept no more jobs, and give all open ones an error. Called by any thread, at the end of the process."""
        self._closed = True
        for job in (*self._waiting, self._current):
            if job is not None:
                job.finish(error)
