"""The coefficients of implicit methods: those of PETSc's TSARKIMEX and TSDIRK, and the theta methods as tables.

PETSc has no function that returns such a table. A step of size 1 from zero is taken with the unit vector e_i as the
implicit slope of stage i, and e_(s + i) as its explicit one. The states of the stages are then the rows of the two
triangles, and the result holds the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from petsc4py import PETSc

from pnode_dist.ode.methods import Method
from pnode_dist.ode.steppers.base import END_OF_TIME, MOST_STEPS, options_database
from pnode_dist.ode.steppers.implicit_ts import set_type
from pnode_dist.petsc import calls

Row = tuple[float, ...]
_PREFIX = "pnode_dist_tableau_"
_ZERO = 1e-15
"""Entries below are rounding of the step that the table is read from."""


@dataclass(frozen=True)
class AdditiveTableau:
    """A diagonally implicit method for M du/dt = g(t, u), with an explicit part h(t, u) if there is one.

    With B_i = M u + h sum_j (`implicit`_ij F_j + `explicit`_ij H_j), stage i solves
    M Y_i - h `implicit`_ii g(t + `nodes`_i h, Y_i) = B_i. Then F_i is g at Y_i, and H_i the explicit part there at
    t + `explicit_nodes`_i h. The result is Y_s if the method `ends_in_last_stage`, else
    u + h sum_i (`weights`_i F_i + `explicit_weights`_i H_i). The rows are square: zero above the diagonal.

    E. Hairer, G. Wanner: Solving Ordinary Differential Equations II, 2nd ed. (1996), sections IV.6 and VI.1. PETSc's
    manual pages of TSARKIMEX, TSDIRK and TSTHETA.
    """

    implicit: tuple[Row, ...]
    weights: Row
    nodes: Row
    explicit: tuple[Row, ...] = ()
    explicit_weights: Row = ()
    explicit_nodes: Row = ()

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.weights)

    @cached_property
    def without_explicit_part(self) -> AdditiveTableau:
        """The method for a right-hand side that is all implicit."""
        return AdditiveTableau(self.implicit, self.weights, self.nodes)

    @cached_property
    def ends_in_last_stage(self) -> bool:
        """True if the result is the state of the last stage (stiffly accurate in both parts)."""
        explicit = not self.explicit or _near(self.explicit[-1], self.explicit_weights)
        return self.implicit[-1][-1] != 0 and _near(self.implicit[-1], self.weights) and explicit

    @cached_property
    def uses_slope(self) -> tuple[bool, ...]:
        """For each stage, True if a later stage or the result uses its implicit slope."""
        return self._used(self.implicit, self.weights)

    @cached_property
    def uses_explicit_slope(self) -> tuple[bool, ...]:
        """For each stage, True if a later stage or the result uses its explicit slope."""
        return self._used(self.explicit, self.explicit_weights) if self.explicit else (False,) * self.stages

    def _used(self, rows: tuple[Row, ...], weights: Row) -> tuple[bool, ...]:
        final = (0.0,) * self.stages if self.ends_in_last_stage else weights
        return tuple(
            final[stage] != 0 or any(row[stage] != 0 for row in rows[stage + 1 :]) for stage in range(self.stages)
        )


def _near(row: Row, other: Row) -> bool:
    return bool(np.allclose(row, other, rtol=1e-14, atol=_ZERO))


def theta_tableau(theta: float, endpoint: bool) -> AdditiveTableau:
    """Return a theta method: one stage at `theta`, or with `endpoint` the two ends of the step as stages."""
    if not endpoint or theta == 1.0:
        return AdditiveTableau(((theta,),), (1.0,), (theta,))
    last = (1.0 - theta, theta)
    return AdditiveTableau(((0.0, 0.0), last), last, (0.0, 1.0))


@cache
def petsc_tableau(method: Method) -> AdditiveTableau:
    """Return PETSc's table of a method of the family `arkimex` or `dirk`, to rounding. Not collective."""
    probe = _Probe(method)
    return probe.take_step()


class _Probe:
    """The callbacks of the step that a table is read from."""

    def __init__(self, method: Method) -> None:
        self._method, self._stages = method, method.stages
        self._handles: list[int] = []
        self._nodes, self._explicit_nodes = np.zeros(self._stages), np.zeros(self._stages)

    def take_step(self) -> AdditiveTableau:
        method, stages = self._method, self._stages
        additive = method.family == "arkimex"
        state = PETSc.Vec().createSeq(2 * stages)
        matrix = PETSc.Mat().createAIJ((2 * stages, 2 * stages), nnz=1, comm=PETSc.COMM_SELF)
        matrix.setUp()
        ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
        ts.setOptionsPrefix(_PREFIX)
        ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
        set_type(ts, method)
        ts.setEquationType(PETSc.TS.EquationType.ODE_EXPLICIT)
        ts.setIFunction(self._residual, state.duplicate())
        ts.setIJacobian(self._jacobian, matrix, matrix)
        if additive:
            ts.setRHSFunction(self._explicit, state.duplicate())
        ts.setSolution(state)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
        ts.setMaxSteps(MOST_STEPS)
        ts.setMaxTime(END_OF_TIME)
        ts.setTimeStep(1.0)
        own = {"ts_adapt_type": "none", "snes_type": "ksponly", "ksp_type": "preonly", "pc_type": "jacobi"}
        with options_database({_PREFIX + name: value for name, value in own.items()}):
            ts.setFromOptions()
        ts.setUp()
        self._handles = calls.stage_handles(ts)
        ts.step()
        rows = [calls.local_array(handle, 2 * stages).copy() for handle in self._handles]
        result = state.getArray().copy()
        for thing in (ts, matrix, state):
            thing.destroy()
        implicit, explicit = [row[:stages] for row in rows], [row[stages:] for row in rows]
        found = AdditiveTableau(tuple(map(_row, implicit)), _row(result[:stages]), _row(self._nodes))
        if not additive:
            return found
        nodes = _row(self._explicit_nodes)
        return replace(
            found,
            explicit=tuple(map(_row, explicit)),
            explicit_weights=_row(result[stages:]),
            explicit_nodes=nodes,
        )

    def _stage(self, u: PETSc.Vec) -> int:
        # A method with an explicit first stage solves for the slope there in another Vec.
        return self._handles.index(u.handle) if u.handle in self._handles else 0

    def _residual(self, ts: PETSc.TS, t: float, u: PETSc.Vec, udot: PETSc.Vec, f: PETSc.Vec) -> None:
        stage = self._stage(u)
        if stage or u.handle in self._handles:
            self._nodes[stage] = t
        values = udot.getArray(readonly=True).copy()
        values[stage] -= 1.0
        f.setArray(values)

    def _jacobian(
        self, ts: PETSc.TS, t: float, u: PETSc.Vec, udot: PETSc.Vec, shift: float, matrix: PETSc.Mat, other: PETSc.Mat
    ) -> None:
        for number in range(2 * self._stages):
            matrix.setValue(number, number, shift)
        matrix.assemble()

    def _explicit(self, ts: PETSc.TS, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        stage = self._stage(u)
        self._explicit_nodes[stage] = t
        values = np.zeros(2 * self._stages)
        values[self._stages + stage] = 1.0
        f.setArray(values)


def _row(entries: Any) -> Row:
    return tuple(0.0 if abs(entry) < _ZERO else float(entry) for entry in entries)
