"""The zero of a function in a bracket, by the ITP method.

I. F. D. Oliveira, R. H. C. Takahashi: An enhancement of the bisection method average performance preserving minmax
optimality, ACM Trans. Math. Softw. 47 (2020). It takes at most one evaluation more than bisection, and converges faster
than linearly where the function is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_TRUNCATION, _SLACK = 0.2, 1


def right_end(
    value: Callable[[float], float], before: tuple[float, float], after: tuple[float, float], tolerance: float
) -> float:
    """Return a time at which `value` has changed its sign, not more than `tolerance` after one at which it has not.

    `before` and `after` are times with their values; `after` may be the earlier one. The value `before` is not zero,
    and that `after` is zero or has the other sign.
    """
    (a, value_a), (b, value_b) = before, after
    width = abs(b - a)
    if width == 0:
        return b
    half = tolerance / 2
    most = max(0, math.ceil(math.log2(width / tolerance))) + _SLACK
    truncation = _TRUNCATION / width
    for number in range(most + 1):
        if abs(b - a) <= tolerance or value_b == 0:
            break
        middle = (a + b) / 2
        secant = (value_b * a - value_a * b) / (value_b - value_a)
        if not math.isfinite(secant):
            secant = middle
        towards = math.copysign(1.0, middle - secant)
        shift = truncation * abs(b - a) ** 2
        tried = secant + towards * shift if shift <= abs(middle - secant) else middle
        radius = max(0.0, half * 2.0 ** (most - number) - abs(b - a) / 2)
        x = tried if abs(tried - middle) <= radius else middle - towards * radius
        # Where the secant is nearly at one end, the other end would stay.
        x = min(max(x, min(a, b) + half), max(a, b) - half)
        found = value(x)
        if found * value_a > 0:
            a, value_a = x, found
        else:
            b, value_b = x, found
    return b
