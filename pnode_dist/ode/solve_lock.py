"""The lock of forward and backward passes: one thread at a time.

PETSc is not thread safe, and solves share a solver. A pass inside another one, of a right-hand side that itself solves,
runs in the same thread and does not wait. Neither does a pass that autograd's engine runs in another thread while the
outer pass waits for the engine, as in backward passes on accelerators. All other threads wait.
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
"""Seconds that a thread waits for a pass that takes no step."""
_POLL = 0.02
_ENGINE_CALLS = list(ENGINE_CALLS)


class _SolveLock:
    """The mutex, and the thread that last entered it."""

    def __init__(self) -> None:
        self.mutex = threading.RLock()
        self.owner = 0


_lock = _SolveLock()


def _renew_after_fork() -> None:
    """Replace the lock in a forked process, where the thread that held it does not exist."""
    global _lock
    _lock = _SolveLock()


os.register_at_fork(after_in_child=_renew_after_fork)


@contextmanager
def solve_lock(is_busy: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold the lock during a pass.

    `is_busy` returns True if the outer pass is using the stepper of this one. Raises `RuntimeError` if the thread in a
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
    """Wait for the lock. Returns False if it is not needed, because its owner waits for this thread."""
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
    """Return True if a thread is inside a call of autograd's engine, which may run nodes in other threads."""
    frame = sys._current_frames().get(thread)
    return frame is not None and frame.f_code in _ENGINE_CALLS
