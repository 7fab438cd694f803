"""The Taylor test of an inverse problem to third order: its value against its gradient and its Hessian."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse.inverse import Inverse
from pnode_dist.verify.gradcheck import LEAST_ORDER, orders

_ROUNDING = 1e3 * sys.float_info.epsilon
_STEPS = 5


@dataclass(frozen=True)
class TaylorTest:
    """The remainders of J(m + h d) at `steps` h that halve, and their orders between one step and the next.

    `remainders[k]` is that of the Taylor polynomial of degree k, for k = 0, 1 and 2, of order k + 1. An order is None
    where a remainder is too near to rounding. The figures are the same on all ranks.
    """

    steps: tuple[float, ...]
    remainders: tuple[tuple[float, ...], ...]
    orders: tuple[tuple[float | None, ...], ...]

    def order(self, degree: int) -> float | None:
        """Return the last order above rounding of the polynomial of this degree, None if there is none."""
        return next((order for order in reversed(self.orders[degree]) if order is not None), None)

    def failures(self) -> list[str]:
        """Return the failures of the gradient and the Hessian, one sentence each; empty for correct ones."""
        found = []
        for degree, name in ((1, "gradient"), (2, "Hessian")):
            order, least = self.order(degree), LEAST_ORDER + degree - 1
            if order is None:
                found.append(f"{name}: all remainders are within rounding: use a longer first_step or direction")
            elif not order >= least:
                found.append(f"{name}: the Taylor order = {order:.3f} is below {least:g}")
        return found


def taylor_test(
    problem: Inverse,
    m: PETSc.Vec,
    direction: PETSc.Vec | None = None,
    *,
    first_step: float = 2.0**-4,
    seed: int = 0,
) -> TaylorTest:
    """Return the remainders of J at m along a direction, without derivatives, with the gradient, and with the Hessian.

    `direction` is by default random with the standard deviations of the priors, and 1 for a control without one. It
    depends on `seed` and global indices alone. Costs 6 evaluations, a gradient and a product with the Hessian.
    Afterwards J is at m again. P. E. Farrell, D. A. Ham, S. W. Funke, M. E. Rognes, SIAM J. Sci. Comput. 35 (2013).
    Raises `ConfigurationError` for a first step that is not positive. Collective.
    """
    if not 0 < first_step < math.inf:
        raise ConfigurationError(f"first_step = {first_step!r}: must be positive")
    along = problem.prior.root(problem.space.random(seed)) if direction is None else direction
    steps = tuple(first_step / 2**halving for halving in range(_STEPS))
    values = [problem(m + step * along) for step in steps]
    value = problem(m)
    slope = problem.derivative().dot(along)
    curvature = problem.hessian(along).dot(along)
    remainders: list[Sequence[float]] = [
        [
            abs(moved - value - a * step * slope - b * step**2 * curvature / 2)
            for moved, step in zip(values, steps, strict=True)
        ]
        for a, b in ((0, 0), (1, 0), (1, 1))
    ]
    smallest = _ROUNDING * max(abs(value), *map(abs, values))
    return TaylorTest(
        steps, tuple(map(tuple, remainders)), tuple(tuple(orders(remainder, smallest)) for remainder in remainders)
    )
