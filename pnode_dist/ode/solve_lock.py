"""One thread at a time in a forward or backward pass: PETSc is not thread safe, and solves share what a solver keeps.

A pass inside of another, where a right-hand side is itself made of solves, is of the same thread and goes on at once.
So does one that autograd's engine runs in a thread of its own while the pass outside waits for the engine, which is
how backward passes on accelerators go. All others wait for their turn.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pnode_dist.ode import safe_points
from pnode_dist.system.torch_internals import ENGINE_CALLS

PATIENCE = 600.0
"""Seconds that a thread waits while the one in a pass takes no step."""
_POLL = 0.02
_ENGINE_CALLS = list(ENGINE_CALLS)


class _SolveLock:
    """Whose turn it is."""

    def __init__(self) -> None:
        self.mutex = threading.RLock()
        self.owner = 0


_lock = _SolveLock()


def _renew_after_fork() -> None:
    """Begin anew in a process that was forked: the thread whose turn it was is not there."""
    global _lock
    _lock = _SolveLock()


os.register_at_fork(after_in_child=_renew_after_fork)


@contextmanager
def solve_lock(is_busy: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Run a pass once no other thread is in one.

    `is_busy` says that what the pass needs is in use by the pass outside. Raises `RuntimeError` where the thread in a
    pass takes no step for `PATIENCE` seconds.
    """
    lock = _lock
    entered = lock.mutex.acquire(blocking=False) or _wait(lock, is_busy)
    if entered:
        lock.owner = threading.get_ident()
    try:
        yield
    finally:
        if entered:
            lock.mutex.release()


def _wait(lock: _SolveLock, is_busy: Callable[[], bool]) -> bool:
    """Wait for the turn: whether the lock was taken, or there was no need because its owner waits for this thread."""
    of_engine = isinstance(threading.current_thread(), threading._DummyThread)
    seen, since = safe_points.steps_begun(), time.monotonic()
    while not lock.mutex.acquire(timeout=_POLL):
        if of_engine and _waits_for_engine(lock.owner) and not is_busy():
            return False
        steps, now = safe_points.steps_begun(), time.monotonic()
        if steps != seen:
            seen, since = steps, now
        elif now - since > PATIENCE:
            name = next((thread.name for thread in threading.enumerate() if thread.ident == lock.owner), "gone")
            raise RuntimeError(
                f"thread {threading.current_thread().name!r} waited {PATIENCE:g} s for its turn to solve, while the "
                f"solve of thread {name!r} took no step: one thread at a time can be in a solve, and func must not "
                "wait for solves of other threads"
            )
    return True


def _waits_for_engine(thread: int) -> bool:
    """Whether a thread is inside of a call of autograd's engine, which nodes of other threads may run for."""
    frame = sys._current_frames().get(thread)
    return frame is not None and frame.f_code in _ENGINE_CALLS
