"""Solvers that are kept between the calls of a model, by what they were made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from pnode_dist.ode.solver import Solver

_MOST = 8


class KeptSolvers:
    """The solvers that a `NeuralODE` keeps between calls, least recently used ones dropped. Collective."""

    def __init__(self) -> None:
        self._solvers: OrderedDict[Any, Solver] = OrderedDict()

    def __reduce__(self) -> tuple[type[KeptSolvers], tuple[()]]:
        # Copies and pickles of a module make solvers of their own.
        return KeptSolvers, ()

    def find(self, key: Any) -> Solver | None:
        """The solver of `key`, if there is one that a solve can use now."""
        solver = self._solvers.get(key)
        if solver is None or solver.stepper.stepping or solver.stepper.failed:
            return None
        return solver if solver.contents is None or solver.contents.are_the_same else None

    def get(self, key: Any, create: Callable[[], Solver], afresh: bool = False) -> Solver:
        """The solver of `key`, made if it is not there; one of its own for a solve inside a step of that solver.

        It is made anew where the contents of what it was made of have changed. Making one is collective: `afresh` says
        that another rank makes one, so that this one has to as well.
        """
        if key in self._solvers and self._solvers[key].stepper.stepping:
            return create()
        if afresh or self.find(key) is None:
            old = self._solvers.pop(key, None)
            if old is not None and old.stepper.comm.size == 1:
                # Other ranks may have none: there PETSc's garbage collection destroys it.
                old.drop()
            self._solvers[key] = solver = create()
            solver.kept = True
            if len(self._solvers) > _MOST:
                self._solvers.popitem(last=False)[1].drop()
        self._solvers.move_to_end(key)
        return self._solvers[key]


class NoSolvers(KeptSolvers):
    """Keeps none: every solver is closed when its solve is done with it."""

    def get(self, key: Any, create: Callable[[], Solver], afresh: bool = False) -> Solver:
        """A solver of the solve's own."""
        return create()
