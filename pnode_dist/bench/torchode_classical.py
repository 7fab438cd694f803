"""The classical Runge-Kutta method of order 4 for torchode, which does not include it."""

from __future__ import annotations

from typing import Any


def classical(term: Any) -> Any:
    """Return torchode's single step method for an `ODETerm`. Raises `ImportError` where torchode is not installed."""
    from torchode.interpolation import ThirdOrderPolynomialInterpolation
    from torchode.single_step_methods.runge_kutta import ButcherTableau, ExplicitRungeKutta

    weights = [1 / 6, 1 / 3, 1 / 3, 1 / 6]
    table = ButcherTableau.from_lists(
        c=[0.0, 0.5, 0.5, 1.0], a=[[], [0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], b=weights, b_err=[0.0] * 4
    )

    class Classical(ExplicitRungeKutta):  # type: ignore[misc]
        def convergence_order(self) -> int:
            return 4

        def build_interpolation(self, data: Any) -> Any:
            return ThirdOrderPolynomialInterpolation.from_k(data.t0, data.dt, data.y0, data.y1, data.k)

    return Classical(term, table)
