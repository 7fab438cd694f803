"""The callbacks of PETSc's implicit steppers: F(t, u, du/dt) = M du/dt - g(t, u), h(t, u), and their Jacobians.

g is the implicit part (all of f, unless it is a `SplitFunction`), and h the explicit one. Jacobians are shell Mats. The
adjoint identifies the stages on a tape by the stage Vecs that PETSc passes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from petsc4py import PETSc

from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.rhs.evaluation import BoundFunction, Function, StageGraph
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.linearisation import Part, Place, Point
from pnode_dist.ode.rhs.mass import MassMatrix
from pnode_dist.ode.rhs.split import MatrixFunction, SplitFunction
from pnode_dist.ode.steppers.tape import Stage
from pnode_dist.petsc import unwinding, vectors


class ImplicitFunction:
    """PETSc's callbacks for one layout. Holds no reference to a TS, whose own references could not be collected.

    `splits`: the right-hand side is a `SplitFunction`, and h is its explicit part. `solves_for_slope`: the method
    begins a step by solving for du/dt. `keeps_values`: fingerprints of f's values in a step are stored. `stage_handles`
    are the handles of the Vecs of the stages. `on_new_operator(point, shift)` is called when PETSc needs the operator
    shift M - dg/du at another state; it is a weak reference to a method of the stepper.
    """

    def __init__(
        self,
        layout: StateLayout,
        parameter_sizes: tuple[int, ...],
        mass: MassMatrix | None,
        on_new_operator: weakref.WeakMethod[Callable[[Point, float], None]],
    ) -> None:
        self.layout, self.mass = layout, mass
        self._parameter_sizes = list(parameter_sizes)
        self._on_new_operator = on_new_operator
        self.bound: BoundFunction | None = None
        self.error: BaseException | None = None
        self.direction = 1.0
        self.start = 0.0
        self.splits = False
        self.solves_for_slope = False
        self.keeps_values = False
        self.stage_handles: set[int] = set()
        self._slope_handle: int | None = None
        self._solving = False
        self.times: dict[Place, float] = {}
        self._values: dict[tuple[Part, float], list[tuple[float, float]]] = {}
        self._kept: Mapping[Place, Stage] = {}
        self._points: dict[Place, Point] = {}
        self.implicit_point: Point | None = None
        self.explicit_point: Point | None = None
        self.explicit_products: list[torch.Tensor | None] | None = None

    def part(self, part: Part) -> Function:
        """Return the function of a part of the bound right-hand side."""
        assert self.bound is not None
        func = self.bound.func
        if not self.splits:
            return func
        assert isinstance(func, SplitFunction)
        return func.implicit if part is Part.IMPLICIT else func.explicit

    def start_step(self, start: float, direction: float) -> None:
        """Begin a step from `start`. `direction` is -1 if time decreases."""
        self.start, self.direction = start, direction
        self._slope_handle = None
        self._solving = False
        self.times.clear()
        self._values.clear()
        self._kept = {}
        self._points.clear()

    def start_adjoint(self, start: float, direction: float, kept: Mapping[Place, Stage]) -> None:
        """Begin the adjoint of a step from `start`, with the stages `kept` on its tape."""
        self.start_step(start, direction)
        self._kept = kept

    def end_step(self) -> None:
        """End a step or its adjoint, and drop all references to its tape."""
        self._kept = {}
        self._points.clear()
        self.implicit_point = self.explicit_point = self.explicit_products = None

    def point(self, part: Part, time: float, inputs: Parts, graph: StageGraph | None = None) -> Point:
        """Return a part of the right-hand side at a state. `time` is the caller's, also if PETSc's runs backward."""
        assert self.bound is not None
        return Point(self.bound, self.part(part), self.layout, self.direction, time, inputs, graph)

    def inputs(self, u: PETSc.Vec) -> Parts:
        """Return the parts of the state in `u` in f's floating type: views of its memory if no conversion is needed."""
        flat = vectors.view(u, (self.layout.size,))
        return self.layout.inputs(self.layout.parts(flat))

    def _at(self, part: Part, t: float, u: PETSc.Vec) -> Point:
        """Return the point at (t, u): one from the tape of the step that is being reversed, else a new one."""
        place = (part, u.handle)
        if place in self._points:
            return self._points[place]
        stage = self._kept.get(place)
        if stage is None:
            return self.point(part, self.direction * t, self.inputs(u))
        if isinstance(stage, StageGraph):
            found = self.point(part, stage.when, stage.inputs, stage)
        else:
            found = self.point(part, stage.when, stage.inputs)
            found.kept = stage
        self._points[place] = found
        return found

    def value_at(self, part: Part, time: float, inputs: Parts) -> float | None:
        """Return the fingerprint of the value that a part had at this point in this step; None if it was not evaluated.

        PETSc's time of a stage may differ from `time` in the last bit.
        """
        found = self._values.get((part, fingerprint(inputs)), ())
        return next((value for when, value in found if math.isclose(when, time, rel_tol=1e-14)), None)

    # The callbacks. PETSc turns an exception into an error code. The stepper raises the exception stored here instead.

    def residual(self, ts: PETSc.TS, t: float, u: PETSc.Vec, udot: PETSc.Vec, f: PETSc.Vec) -> None:
        """IFunction: f = M udot - g(t, u)."""
        if self.error is not None:
            self._fail()
            return
        try:
            if self.solves_for_slope and self._slope_handle is None:
                self._slope_handle = u.handle
            t = self._time(t, u)
            self.times.setdefault((Part.IMPLICIT, u.handle), self.direction * t)
            rates = vectors.view(udot, (self.layout.size,))
            result = vectors.view(f, (self.layout.size,))
            result.copy_(rates if self.mass is None else self.mass.multiply(rates))
            self._add(Part.IMPLICIT, t, u, result, -1.0)
            f.stateIncrease()
        except BaseException as error:
            self.error = unwinding.begin(error)
            self._fail()

    def _fail(self) -> None:
        """Raise the stored error, or defer it to the solve for the slope.

        PETSc searches for algebraic equations before that solve, and leaks Vecs if that search fails.
        """
        if self.error is not None and (self._solving or not self.solves_for_slope):
            raise self.error

    def initial_guess(self, snes: PETSc.SNES, x: PETSc.Vec) -> None:
        """Set the initial guess of a solve for the slope to zero. By default it would depend on earlier steps."""
        self._solving = True
        if x.handle not in self.stage_handles:
            x.zeroEntries()

    def explicit(self, ts: PETSc.TS, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        """RHSFunction: f = h(t, u), zero where all of the right-hand side is implicit."""
        try:
            result = vectors.view(f, (self.layout.size,))
            result.zero_()
            if self.splits:
                self.times.setdefault((Part.EXPLICIT, u.handle), self.direction * t)
                self._add(Part.EXPLICIT, t, u, result, 1.0)
            f.stateIncrease()
        except BaseException as error:
            self.error = unwinding.begin(error)
            raise

    def _time(self, t: float, u: PETSc.Vec) -> float:
        """Return the time of an evaluation at `u`.

        A DIRK method with an explicit first stage begins by solving for the slope there. PETSc then passes the time of
        the last stage that it has evaluated.
        """
        return self.direction * self.start if u.handle == self._slope_handle else t

    def _add(self, part: Part, t: float, u: PETSc.Vec, result: torch.Tensor, sign: float) -> None:
        assert self.bound is not None
        func = self.part(part)
        if isinstance(func, MatrixFunction):
            self.bound.evaluations += 1
            result.add_(func.multiply(vectors.view(u, (self.layout.size,)), False), alpha=sign * self.direction)
            return
        inputs = self.inputs(u)
        values = self.bound.value(func, self.layout, self.direction * t, inputs)
        if self.keeps_values:
            self._values.setdefault((part, fingerprint(inputs)), []).append((self.direction * t, fingerprint(values)))
        for target, value in zip(self.layout.parts(result), values, strict=True):
            target.add_(value.detach().to(target.device), alpha=sign * self.direction)

    def jacobian(
        self,
        ts: PETSc.TS,
        t: float,
        u: PETSc.Vec,
        udot: PETSc.Vec,
        shift: float,
        operator: PETSc.Mat,
        matrix: PETSc.Mat,
    ) -> None:
        """IJacobian: set `operator` to shift M - dg/du at (t, u)."""
        try:
            self.implicit_point = self._at(Part.IMPLICIT, self._time(t, u), u)
            context = operator.getPythonContext()
            context.shift, context.factor = shift, 1.0
            on_new_operator = self._on_new_operator()
            assert on_new_operator is not None
            on_new_operator(self.implicit_point, shift)
            operator.assemble()
        except BaseException as error:
            self.error = unwinding.begin(error)
            raise

    def explicit_jacobian(self, ts: PETSc.TS, t: float, u: PETSc.Vec, operator: PETSc.Mat, matrix: PETSc.Mat) -> None:
        """RHSJacobian: set `operator` to dh/du at (t, u)."""
        if self.splits:
            self.explicit_point = self._at(Part.EXPLICIT, t, u)

    def parameter_jacobian(
        self, ts: PETSc.TS, t: float, u: PETSc.Vec, udot: PETSc.Vec, shift: float, operator: PETSc.Mat
    ) -> None:
        """IJacobianP: set `operator` to -dg/dtheta at (t, u)."""
        self.implicit_point = self._at(Part.IMPLICIT, t, u)

    def explicit_parameter_jacobian(self, ts: PETSc.TS, t: float, u: PETSc.Vec, operator: PETSc.Mat) -> None:
        """RHSJacobianP: set `operator` to dh/dtheta at (t, u)."""
        if self.splits:
            self.explicit_point = self._at(Part.EXPLICIT, t, u)

    def add_parameters(self, products: list[torch.Tensor | None], result: PETSc.Vec, sign: float) -> None:
        """Set result = sign * products, with zero for None."""
        flat = vectors.view(result, (sum(self._parameter_sizes),))
        for target, value in zip(torch.split(flat, self._parameter_sizes), products, strict=True):
            if value is None:
                target.zero_()
            else:
                numbers = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
                target.copy_(numbers.reshape(-1)).mul_(sign)
        result.stateIncrease()


class ShiftedOperator:
    """Context of the shell Mat factor * (shift M - dg/du), at the function's current point."""

    def __init__(self, function: ImplicitFunction) -> None:
        self._function = function
        self.shift, self.factor = 1.0, 1.0

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        self._apply(x, y, transposed=False)

    def multTranspose(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        self._apply(x, y, transposed=True)

    def scale(self, mat: PETSc.Mat, factor: float) -> None:
        """Scale the operator until the next Jacobian. (PETSc does so to start methods with an explicit stage.)"""
        self.factor *= factor

    def duplicate(self, mat: PETSc.Mat, option: Any) -> PETSc.Mat:
        """Return a zero operator of the same sizes, for the explicit part that PETSc expects even if there is none."""
        copy = PETSc.Mat().createPython(mat.getSizes(), ZeroOperator(), comm=mat.comm)
        copy.setUp()
        return copy

    def _apply(self, x: PETSc.Vec, y: PETSc.Vec, transposed: bool) -> None:
        function = self._function
        try:
            point = function.implicit_point
            assert point is not None
            flat = vectors.view(x, (function.layout.size,))
            product = (point.vjp(flat) if transposed else point.jvp(flat)).neg_()
            product.add_(flat if function.mass is None else function.mass.multiply(flat, transposed), alpha=self.shift)
            vectors.view(y, (function.layout.size,)).copy_(product.mul_(self.factor))
            y.stateIncrease()
        except BaseException as error:
            function.error = unwinding.begin(error)
            raise


class ZeroOperator:
    """Context of a shell Mat that is zero."""

    def zeroEntries(self, mat: PETSc.Mat) -> None:
        """Nothing to do."""

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        y.zeroEntries()

    def multTranspose(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        y.zeroEntries()


class ExplicitOperator:
    """Context of the shell Mat dh/du, of which the adjoint uses the transpose alone."""

    def __init__(self, function: ImplicitFunction) -> None:
        self._function = function

    def multTranspose(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        function = self._function
        try:
            size = function.layout.size
            if function.splits:
                assert function.explicit_point is not None
                # PETSc asks for the product with respect to the parameters, with the same vector, next.
                state_product, function.explicit_products = function.explicit_point.vjp_with_parameters(
                    vectors.view(x, (size,)), function.start
                )
                vectors.view(y, (size,)).copy_(state_product)
                y.stateIncrease()
            else:
                y.zeroEntries()
        except BaseException as error:
            function.error = unwinding.begin(error)
            raise


class ParameterOperator:
    """Context of the shell Mats -dg/dtheta and dh/dtheta, whose columns are this rank's own: no communication here."""

    def __init__(self, function: ImplicitFunction, part: Part) -> None:
        self._function, self._part = function, part

    def multTranspose(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        function = self._function
        try:
            implicit = self._part is Part.IMPLICIT
            if not implicit and not function.splits:
                y.zeroEntries()
                return
            if implicit:
                assert function.implicit_point is not None
                products = function.implicit_point.parameter_products(
                    vectors.view(x, (function.layout.size,)), function.start
                )
            else:
                assert function.explicit_products is not None
                products, function.explicit_products = function.explicit_products, None
            function.add_parameters(products, y, -1.0 if implicit else 1.0)
        except BaseException as error:
            function.error = unwinding.begin(error)
            raise
