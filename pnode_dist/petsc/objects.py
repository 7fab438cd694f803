"""PETSc objects that nothing needs any more, until all of their ranks destroy them together.

Destruction is collective and Python's collector is not. petsc4py puts an object on a list when Python drops it, and
PETSc destroys what is on the lists of all ranks. It loses whatever is dropped during that, such as the Vecs that only
the callbacks of a TS hold. So a solver's objects are destroyed one by one, in the same order on all ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

from mpi4py import MPI
from petsc4py import PETSc


class Destroyable(Protocol):
    """Holds PETSc objects."""

    def destroy(self) -> None:
        """Destroy all of them. Collective."""
        ...


class _Ranks:
    """The objects that this rank has left on a communicator; `made` counts the `PetscObjects` made on it by all ranks.

    PETSc duplicates a communicator for its objects and frees the duplicate with the last of them. Ranks drop objects at
    different times, and one of them would duplicate it anew alone. So one more reference is held. Making it is
    collective.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self.held = PETSc.Comm(comm).duplicate()
        self.made = 0
        self.left: dict[int, PetscObjects] = {}


_key: list[int] = []
_freed: list[PETSc.Comm] = []
"""Duplicates of communicators that were freed. PETSc cannot give one up while MPI is freeing what it belongs to."""


def _of(comm: MPI.Comm) -> _Ranks:
    """The record of `comm`, dropped when that is freed. Collective the first time."""
    if not _key:
        _key.append(MPI.Comm.Create_keyval(delete_fn=lambda _comm, _key, ranks: _freed.append(ranks.held)))
    known: Any = comm.Get_attr(_key[0])
    ranks: _Ranks = _Ranks(comm) if known is None else known
    if known is None:
        comm.Set_attr(_key[0], ranks)
    return ranks


class PetscObjects:
    """The PETSc objects of one solver, in the order of their making. Making one is collective on `comm`."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._things: list[Destroyable] = []
        self._ranks = _of(comm) if comm.size > 1 else None
        self._number = 0
        if self._ranks is not None:
            self._number = self._ranks.made
            self._ranks.made += 1

    @property
    def are_destroyed(self) -> bool:
        """Whether there are none any more."""
        return not self._things

    def add(self, thing: Destroyable) -> None:
        """Take another one."""
        self._things.append(thing)

    def destroy(self) -> None:
        """Destroy them, the last one first. Collective on the communicator."""
        self.keep()
        while self._things:
            self._things.pop().destroy()

    def leave(self) -> None:
        """Leave them to be destroyed: now on one rank, else by `destroy_left`. Not collective."""
        if self._ranks is None:
            self.destroy()
        elif self._things:
            self._ranks.left[self._number] = self

    def keep(self) -> None:
        """Take back that they are left."""
        if self._ranks is not None:
            self._ranks.left.pop(self._number, None)


def destroy_left(comm: MPI.Comm) -> None:
    """Destroy what all ranks of `comm` have left, as solves that raised and graphs that were dropped do.

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
