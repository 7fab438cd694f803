"""Numerical derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def directional_derivative(
    function: Callable[..., torch.Tensor | float],
    point: Sequence[torch.Tensor],
    direction: Sequence[torch.Tensor],
    step: float = 1e-3,
) -> float:
    """d/de function(point + e direction) at e = 0 by the central difference of fourth order in `step`.

    `point` and `direction` are the arguments of a scalar `function`, one tensor each; nothing is differentiated.
    """

    def value(distance: float) -> float:
        with torch.no_grad():
            return float(function(*(p.detach() + distance * d for p, d in zip(point, direction, strict=True))))

    near, far = value(step) - value(-step), value(2 * step) - value(-2 * step)
    return (8 * near - far) / (12 * step)
