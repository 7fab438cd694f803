"""The functions that TAO calls: J and its derivatives at x, with m = guess + L x."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError, ConvergenceError, StepSizeError
from pnode_dist.inverse.covariance import Diagonal
from pnode_dist.inverse.inverse import Inverse
from pnode_dist.inverse.record import Record

_REJECTED = (ConvergenceError, StepSizeError)
_WORSE = 1e150
"""The value of J where the solve fails: TAO's trust regions refuse infinity, and divide by small numbers."""


class Evaluations:
    """J as TAO's function of x, with its failures and its record. All methods are collective.

    `hessian` and `jacobian` are the contexts of PETSc matrices. `solves` counts evaluations of J, `products` those of
    matrices; those that were read from a record are not counted. `error` is the exception that ended an evaluation,
    which PETSc replaces by its own.
    """

    def __init__(self, problem: Inverse, guess: PETSc.Vec, hessian: str, record: Record | None) -> None:
        self.problem, self._guess, self._record = problem, guess, record
        self._product = problem.inner_product
        self.solves = self.products = 0
        self.error: BaseException | None = None
        multiply = problem.hessian if hessian == "exact" else problem.gauss_newton
        self.hessian = _Matrix(self, "hessian", lambda v: self._to_x(multiply(self._along(v))))
        self.jacobian = _Matrix(
            self,
            "jacobian",
            lambda v: problem.residual_jvp(self._along(v)),
            lambda w: self._to_x(problem.residual_vjp(w)),
        )
        self._present: PETSc.Vec | None = None
        self._last: tuple[PETSc.Vec, float, PETSc.Vec] | None = None

    @property
    def residual_size(self) -> int:
        """The number of this rank's residuals."""
        observed = sum(observation.data.numel() for observation in self.problem.model.observations)
        return observed + self.problem.space.local_size

    def point(self, x: PETSc.Vec) -> PETSc.Vec:
        """Return m."""
        return self._guess + self._along(x)

    def bound(self, bound: PETSc.Vec) -> PETSc.Vec:
        """Return the bound of x for one of m. Raises `ConfigurationError` unless L is diagonal."""
        if not all(covariance is None or isinstance(covariance, Diagonal) for covariance in self._product.covariances):
            raise ConfigurationError("bounds: need a diagonal inner_product: must be a variance, a tensor, or None")
        difference = self._product.root_solve(bound - self._guess)
        # Dividing the largest number may overflow.
        difference.array[:] = difference.array_r.clip(PETSc.NINFINITY, PETSc.INFINITY)
        return difference

    def objective(self, tao: PETSc.TAO, x: PETSc.Vec) -> float:
        """Return J, or a very large value where the solve fails."""
        value = self._result("value", x, None, lambda x, _: self._value(x))
        return value if math.isfinite(value) else _WORSE

    def gradient(self, tao: PETSc.TAO, x: PETSc.Vec, g: PETSc.Vec) -> None:
        """Compute the gradient at a point where J is finite."""
        self._result("gradient", x, g, lambda x, g: self._slope(x, g))

    def objective_and_gradient(self, tao: PETSc.TAO, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """Return J and compute its gradient; where the solve fails, those of a point that a line search rejects."""
        value = self._result("value and gradient", x, g, self._value_and_slope)
        if math.isfinite(value):
            self._last = x.copy(), value, g.copy()
            return value
        return self._rejected(x, g)

    def residual(self, tao: PETSc.TAO, x: PETSc.Vec, r: PETSc.Vec) -> None:
        """Compute the whitened residuals; they are very large where the solve fails."""
        self._result("residual", x, r, self._residual)

    def set_point(self, tao: PETSc.TAO, x: PETSc.Vec, *matrices: PETSc.Mat) -> None:
        """Set the point at which the matrices are applied."""
        self._present = x.copy()
        self.hessian.shifted = 0.0

    def multiplied(self, kind: str, v: PETSc.Vec, image: PETSc.Vec, product: Callable[[PETSc.Vec], PETSc.Vec]) -> None:
        """Compute the product of a matrix at the present point."""

        def compute(v: PETSc.Vec, image: PETSc.Vec) -> float:
            assert self._present is not None
            self._evaluated(self.point(self._present))
            self.products += 1
            product(v).copy(image)
            return 0.0

        self._result(kind, v, image, compute)

    def _result(self, kind: str, x: PETSc.Vec, image: PETSc.Vec | None, compute: Callable[..., float]) -> float:
        try:
            return compute(x, image) if self._record is None else self._record.result(kind, x, image, compute)
        except BaseException as error:
            self.error = error
            raise

    def _evaluated(self, m: PETSc.Vec) -> float | None:
        """Evaluate J at m unless it was the last point. Returns the value, None for the last point."""
        if self.problem.is_at(m):
            return None
        self.solves += 1
        return self.problem(m)

    def _value(self, x: PETSc.Vec) -> float:
        self.solves += 1
        try:
            value = self.problem(self.point(x))
        except _REJECTED:
            if self.solves == 1:
                raise
            return math.inf
        return value if math.isfinite(value) else math.inf

    def _slope(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        self._evaluated(self.point(x))
        self._to_x(self.problem.derivative()).copy(g)
        return 0.0

    def _value_and_slope(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        value = self._value(x)
        if math.isfinite(value):
            try:
                self._to_x(self.problem.derivative()).copy(g)
            except _REJECTED:
                value = math.inf
        if math.isfinite(value) and math.isfinite(g.norm()):
            return value
        g.set(0.0)
        return math.inf

    def _residual(self, x: PETSc.Vec, r: PETSc.Vec) -> float:
        value = self._value(x)
        if math.isfinite(value):
            self.problem.residual().copy(r)
        else:
            r.set(math.sqrt(_WORSE / r.getSize()))
        return value

    def _rejected(self, x: PETSc.Vec, g: PETSc.Vec) -> float:
        """Return value and slope at x of a parabola with its minimum a quarter of the way from the last good point.

        TAO's line searches stop at an infinite value, because they interpolate between values and slopes.
        """
        if self._last is None:
            return _WORSE
        origin, value, slope = self._last
        step = x - origin
        descent = abs(slope.dot(step))
        length = step.dot(step)
        if length == 0 or descent == 0:
            return _WORSE
        step.scale(3 * descent / length)
        step.copy(g)
        return float(value + descent)

    def _along(self, x: PETSc.Vec) -> PETSc.Vec:
        return x if self._product.is_identity else self._product.root(x)

    def _to_x(self, gradient: PETSc.Vec) -> PETSc.Vec:
        return gradient if self._product.is_identity else self._product.root_transpose(gradient)


class _Matrix:
    """A matrix at the present point of `Evaluations`, as the context of a PETSc Mat.

    `shifted` times the identity is added to it: TAO makes an indefinite Hessian definite.
    """

    def __init__(
        self,
        owner: Evaluations,
        kind: str,
        product: Callable[[PETSc.Vec], PETSc.Vec],
        transposed: Callable[[PETSc.Vec], PETSc.Vec] | None = None,
    ) -> None:
        self._owner, self._kind, self._product = owner, kind, product
        self._transposed = transposed or product
        self.shifted = 0.0

    def mult(self, matrix: Any, v: PETSc.Vec, image: PETSc.Vec) -> None:
        """Compute the product with v."""
        self._owner.multiplied(self._kind, v, image, self._product)
        if self.shifted:
            image.axpy(self.shifted, v)

    def shift(self, matrix: Any, by: float) -> None:
        """Add a multiple of the identity."""
        self.shifted += by

    def multTranspose(self, matrix: Any, v: PETSc.Vec, image: PETSc.Vec) -> None:
        """Compute the product of the transpose with v."""
        self._owner.multiplied(f"transposed {self._kind}", v, image, self._transposed)
