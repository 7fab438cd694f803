"""Where a solve may be given up: between its steps. Who wants to is asked there; who watches a run sees it get on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mpi4py import MPI


class Watcher(Protocol):
    """Asked between the steps of all solves. What it raises ends the solve, and has to be raised on all its ranks."""

    def between_steps(self, comm: MPI.Comm) -> None:
        """Before every step, forward, again or adjoint, of a solve on `comm`. Collective on it."""
        ...

    def after_solve(self, comm: MPI.Comm) -> None:
        """At the end of every forward and every backward pass on `comm`. Collective on it."""
        ...


_watchers: list[Watcher] = []
_steps_begun = 0


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Ask `watcher` meanwhile."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def steps_begun() -> int:
    """How many steps all solves of this process have begun so far."""
    return _steps_begun


def between_steps(comm: MPI.Comm) -> None:
    """Called by a solve before each of its steps."""
    global _steps_begun
    _steps_begun += 1
    for watcher in _watchers:
        watcher.between_steps(comm)


def after_solve(comm: MPI.Comm) -> None:
    """Called by a solve at the end of each of its passes."""
    for watcher in _watchers:
        watcher.after_solve(comm)
