"""The cache of solvers between the calls of a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from pnode_dist.ode.solver import Solver

_MOST = 8
_T = TypeVar("_T")


class KeptSolvers:
    """A cache of solvers, of which the least recently used ones are dropped. Collective."""

    def __init__(self) -> None:
        self._solvers: OrderedDict[Any, Solver] = OrderedDict()
        self._made: OrderedDict[Any, Any] = OrderedDict()

    def __reduce__(self) -> tuple[type[KeptSolvers], tuple[()]]:
        # Copies and pickles of a module begin with an empty cache.
        return KeptSolvers, ()

    def find(self, key: Any) -> Solver | None:
        """Return the solver of `key`; None if there is none, or if a solve cannot use it now."""
        solver = self._solvers.get(key)
        if solver is None or solver.stepper.stepping or solver.stepper.failed:
            return None
        return solver if solver.contents is None or solver.contents.are_the_same else None

    def get(self, key: Any, create: Callable[[], Solver], afresh: bool = False) -> Solver:
        """Return the solver of `key`, and make it if needed. A solve inside a step of that solver gets a new one.

        The solver is made again if the contents of the objects it was made of have changed. Making a solver is
        collective: with `afresh` another rank makes one, so this rank must too.
        """
        if key in self._solvers and self._solvers[key].stepper.stepping:
            return create()
        if afresh or self.find(key) is None:
            old = self._solvers.pop(key, None)
            if old is not None and old.stepper.comm.size == 1:
                # On several ranks others may have none: PETSc's garbage collection destroys it.
                old.drop()
            self._solvers[key] = solver = create()
            solver.kept = True
            if len(self._solvers) > _MOST:
                self._solvers.popitem(last=False)[1].drop()
        self._solvers.move_to_end(key)
        return self._solvers[key]

    def once(self, key: Any, make: Callable[[], _T]) -> _T:
        """Return what `make` has made for `key`, which must hold the objects whose identities are in the key."""
        if key not in self._made:
            self._made[key] = make()
            if len(self._made) > _MOST:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        found: _T = self._made[key]
        return found


class NoSolvers(KeptSolvers):
    """An empty cache: every solver is closed at the end of its solve."""

    def get(self, key: Any, create: Callable[[], Solver], afresh: bool = False) -> Solver:
        """Return a new solver."""
        return create()
