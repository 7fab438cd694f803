"""The stepper of symplectic methods: that of explicit methods, with kicks and drifts in place of stages."""

from __future__ import annotations

from petsc4py import PETSc

from pnode_dist.ode.methods import Method
from pnode_dist.ode.steppers.explicit import ExplicitStepper
from pnode_dist.ode.steppers.explicit_step import Scheme
from pnode_dist.ode.steppers.symplectic_step import COMPOSITIONS


class SymplecticStepper(ExplicitStepper):
    """A stepper of the family `symplectic`, for states of pairs (q, p). Its TS runs PETSc's monitors alone."""

    def _scheme(self, ts: PETSc.TS, method: Method) -> tuple[Method, Scheme]:
        return method, COMPOSITIONS[method.name]
