"""Collective destruction of PETSc objects.

Destruction is collective, and Python's garbage collection is not. petsc4py puts an object that Python frees on a list,
and PETSc destroys the objects on the lists of all ranks. It leaks objects that are freed meanwhile, such as Vecs that
only the callbacks of a TS hold. So a solver's objects are destroyed one by one, in the same order on all ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

from mpi4py import MPI
from petsc4py import PETSc


class Destroyable(Protocol):
    """An object that holds PETSc objects."""

    def destroy(self) -> None:
        """Destroy the PETSc objects. Collective."""
        ...


class _Ranks:
    """The objects that this rank has left on a communicator. `made` counts the `PetscObjects` made there by all ranks.

    PETSc duplicates a communicator for its objects, and frees the duplicate with the last of them. Ranks free objects
    at different times, and one rank alone would duplicate it again. So this holds one more reference. Making it is
    collective.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self.held = PETSc.Comm(comm).duplicate()
        self.made = 0
        self.left: dict[int, PetscObjects] = {}


_key: list[int] = []
_freed: list[PETSc.Comm] = []
"""Duplicates of communicators that were freed. PETSc cannot free one while MPI is freeing its original."""


def _of(comm: MPI.Comm) -> _Ranks:
    """Return the record of `comm`, which ends when `comm` is freed. Collective at the first call."""
    if not _key:
        _key.append(MPI.Comm.Create_keyval(delete_fn=lambda _comm, _key, ranks: _freed.append(ranks.held)))
    known: Any = comm.Get_attr(_key[0])
    ranks: _Ranks = _Ranks(comm) if known is None else known
    if known is None:
        comm.Set_attr(_key[0], ranks)
    return ranks


class PetscObjects:
    """The PETSc objects of one solver, in the order of their creation. Creating one is collective on `comm`."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._things: list[Destroyable] = []
        self._ranks = _of(comm) if comm.size > 1 else None
        self._number = 0
        if self._ranks is not None:
            self._number = self._ranks.made
            self._ranks.made += 1

    @property
    def are_destroyed(self) -> bool:
        """True if all objects were destroyed."""
        return not self._things

    def add(self, thing: Destroyable) -> None:
        """Add an object."""
        self._things.append(thing)

    def destroy(self) -> None:
        """Destroy the objects, the last one first. Collective on the communicator."""
        self.keep()
        while self._things:
            self._things.pop().destroy()

    def leave(self) -> None:
        """Leave the objects to `destroy_left`. On one rank, destroy them now. Not collective."""
        if self._ranks is None:
            self.destroy()
        elif self._things:
            self._ranks.left[self._number] = self

    def keep(self) -> None:
        """Undo `leave`."""
        if self._ranks is not None:
            self._ranks.left.pop(self._number, None)


def destroy_left(comm: MPI.Comm) -> None:
    """Destroy the objects that all ranks of `comm` have left, after solves that raised and graphs that were dropped.

    Collective on `comm`.
    """
    if comm.size == 1:
        return
    while _freed:
        _freed.pop().destroy()
    left = _of(comm).left
    everywhere = set[int].intersection(*map(set, comm.allgather(tuple(left))))
    for number in sorted(everywhere):
        left[number].destroy()
    PETSc.garbage_cleanup(comm)
