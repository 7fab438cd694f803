"""Hooks called between the steps of all solves, for preemption and progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mpi4py import MPI


class Watcher(Protocol):
    """A hook between the steps of all solves. An exception ends the solve, and must be raised on all its ranks."""

    def between_steps(self, comm: MPI.Comm) -> None:
        """Run before every step of a solve on `comm`: forward, recomputed or adjoint. Collective on `comm`."""
        ...

    def after_solve(self, comm: MPI.Comm) -> None:
        """Run at the end of every forward and every backward pass on `comm`. Collective on `comm`."""
        ...


_watchers: list[Watcher] = []
_steps_begun = 0


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call the hooks of `watcher` within the context."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def steps_begun() -> int:
    """Return the number of steps that all solves of this process have begun so far."""
    return _steps_begun


def between_steps(comm: MPI.Comm) -> None:
    """Count a step that begins, and call the hooks."""
    global _steps_begun
    _steps_begun += 1
    for watcher in _watchers:
        watcher.between_steps(comm)


def after_solve(comm: MPI.Comm) -> None:
    """Call the hooks at the end of a pass."""
    for watcher in _watchers:
        watcher.after_solve(comm)
