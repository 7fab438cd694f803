"""The equations of all stages of a step as one system for PETSc's SNES: residual, Jacobian and its transpose.

With W = A^-1 and `scale` = 1 / |h| the residual of stage i is scale sum_j W_ij M (Y_j - u) - f(t + c_i h, Y_i). If time
decreases, f is replaced by -f, see `Point`. Its Jacobian, scale W (x) M - diag(df/du), is a shell Mat. Vectors hold
the stages of this rank one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from petsc4py import PETSc

from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.rhs.evaluation import BoundFunction, StageGraph, StageState
from pnode_dist.ode.rhs.layout import StateLayout
from pnode_dist.ode.rhs.linearisation import Point
from pnode_dist.ode.rhs.mass import MassMatrix
from pnode_dist.ode.steppers.irk.tableau import IrkTableau
from pnode_dist.ode.steppers.tape import Stage
from pnode_dist.petsc import unwinding, vectors

OnNewOperator = Callable[[Sequence[Point], float, PETSc.KSP], None]


class StackedStages:
    """PETSc's callbacks for one layout, and the context of the shell Mat of the Jacobian.

    Holds no reference to a SNES, whose own references could not be collected. `on_new_operator(points, scale, ksp)` is
    called when PETSc needs the Jacobian at other stages.
    """

    def __init__(self, layout: StateLayout, mass: MassMatrix | None, tableau: IrkTableau) -> None:
        self.layout, self.mass, self.tableau = layout, mass, tableau
        self.on_new_operator: OnNewOperator | None = None
        self.bound: BoundFunction | None = None
        self.error: BaseException | None = None
        self.time = 0.0
        self.size = 1.0
        self._before: torch.Tensor | None = None
        self._points: list[Point] = []

    @property
    def scale(self) -> float:
        """1 / |h|."""
        return 1.0 / abs(self.size)

    def start_step(self, time: float, size: float, before: torch.Tensor) -> None:
        """Begin a step of `size` from the flat state `before` at `time`."""
        self.time, self.size, self._before = time, size, before

    def start_adjoint(self, time: float, size: float, tape: Sequence[Stage]) -> list[Point]:
        """Begin the adjoint of a step with its stages on the `tape`. Returns them as points."""
        self.time, self.size = time, size
        self._points = []
        for stage in tape:
            assert stage is not None
            if isinstance(stage, StageGraph):
                point = self._point(stage.when, stage.inputs, stage)
            else:
                point = self._point(stage.when, stage.inputs)
                point.kept = stage
            self._points.append(point)
        return self._points

    def end_step(self) -> None:
        """End a step or its adjoint, and drop all references to its tape."""
        self._before, self._points = None, []

    def kept(self, stages: torch.Tensor, level: str) -> list[Stage]:
        """Return the tape of a step from its `stages` `[stage, entry]`. Collective if f is."""
        found: list[Stage] = []
        for point in self._points_at(stages.clone()):
            bound = point.bound
            if level != "stages":
                found.append(bound.graph(point.func, self.layout, point.time, point.inputs))
                continue
            mark = None
            if bound.guard is not None:
                mark = fingerprint(bound.value(point.func, self.layout, point.time, point.inputs))
            found.append(StageState(point.time, point.inputs, fingerprint=mark))
        return found

    def _point(self, when: float, inputs: tuple[torch.Tensor, ...], graph: StageGraph | None = None) -> Point:
        assert self.bound is not None
        return Point(self.bound, self.bound.func, self.layout, math.copysign(1.0, self.size), when, inputs, graph)

    def _points_at(self, stages: torch.Tensor) -> list[Point]:
        layout = self.layout
        times = [self.time + node * self.size for node in self.tableau.nodes]
        return [
            self._point(when, layout.inputs(layout.parts(stage))) for when, stage in zip(times, stages, strict=True)
        ]

    def view(self, vec: PETSc.Vec) -> torch.Tensor:
        """Return this rank's entries of all stages, `[stage, entry]`, without a copy."""
        return vectors.view(vec, (self.tableau.stages, self.layout.size))

    def multiplied(self, stages: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Return M or M^T times each row of `[stage, entry]`. Collective if M is assembled."""
        mass = self.mass
        return stages if mass is None else torch.stack([mass.multiply(row, transposed) for row in stages])

    # The callbacks. PETSc turns an exception into an error code. The stepper raises the exception stored here instead.

    def residual(self, snes: PETSc.SNES, x: PETSc.Vec, f: PETSc.Vec) -> None:
        """Set f to the residual at the stages in x."""
        try:
            assert self._before is not None
            stages, layout = self.view(x), self.layout
            result = self.multiplied(self.tableau.inverse @ (stages - self._before)).mul_(self.scale)
            for row, point in zip(result, self._points_at(stages), strict=True):
                values = point.bound.value(point.func, layout, point.time, point.inputs)
                for target, value in zip(layout.parts(row), values, strict=True):
                    target.sub_(value.detach().to(target), alpha=point.sign)
            self.view(f).copy_(result)
            f.stateIncrease()
        except BaseException as error:
            self.error = unwinding.begin(error)
            raise

    def jacobian(self, snes: PETSc.SNES, x: PETSc.Vec, operator: PETSc.Mat, matrix: PETSc.Mat) -> None:
        """Set `operator` to the Jacobian at the stages in x."""
        try:
            self._points = self._points_at(self.view(x))
            assert self.on_new_operator is not None
            self.on_new_operator(self._points, self.scale, snes.getKSP())
            operator.assemble()
        except BaseException as error:
            self.error = unwinding.begin(error)
            raise

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = Jacobian x."""
        self._apply(x, y, transposed=False)

    def multTranspose(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = Jacobian^T x."""
        self._apply(x, y, transposed=True)

    def _apply(self, x: PETSc.Vec, y: PETSc.Vec, transposed: bool) -> None:
        try:
            given, inverse = self.view(x), self.tableau.inverse
            result = self.multiplied((inverse.T if transposed else inverse) @ given, transposed).mul_(self.scale)
            for row, point, vector in zip(result, self._points, given, strict=True):
                row.sub_(point.vjp(vector) if transposed else point.jvp(vector))
            self.view(y).copy_(result)
            y.stateIncrease()
        except BaseException as error:
            self.error = unwinding.begin(error)
            raise
