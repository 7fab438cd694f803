"""The slopes of interpolants at their knots, as linear combinations of the values there."""

from __future__ import annotations

import numpy as np

from pnode_dist.errors import ConfigurationError

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
MOST_KNOTS = 4096
"""The most knots of a spline. Each of its slopes depends on all values, so the weights are a dense matrix."""


def spline_slopes(steps: Array, periodic: bool) -> Array:
    """Return the matrix `[n, n]` from values to the slopes of the cubic spline through them.

    `steps` are the distances of successive knots, `[n - 1]`, or `[n]` with the one back to the first knot if
    `periodic`. The second derivative is continuous; at the ends it is zero (a natural spline) or periodic. (C. de Boor:
    A Practical Guide to Splines, rev. ed. (2001), chapter IV.) Raises `ConfigurationError` for too many knots.
    """
    n = len(steps) + (0 if periodic else 1)
    if n > MOST_KNOTS:
        raise ConfigurationError(
            f"times: {n} knots of kind = 'cubic': must be at most {MOST_KNOTS}; kind = 'hermite' has no limit"
        )
    left, right = np.zeros((n, n)), np.zeros((n, n))
    for k in range(0 if periodic else 1, n if periodic else n - 1):
        before, after = steps[k - 1], steps[k]
        # The neighbours of a periodic spline of few knots coincide, so add.
        for column, weight in (((k - 1) % n, after), (k, 2 * (before + after)), ((k + 1) % n, before)):
            left[k, column] += weight
        for column, weight in (
            ((k - 1) % n, -after / before),
            (k, after / before - before / after),
            ((k + 1) % n, before / after),
        ):
            right[k, column] += 3 * weight
    if not periodic:
        for end, inside, step in ((0, 1, steps[0]), (n - 1, n - 2, -steps[-1])):
            left[end, end], left[end, inside] = 2.0, 1.0
            right[end, end], right[end, inside] = -3 / step, 3 / step
    return np.asarray(np.linalg.solve(left, right), dtype=np.float64)


def difference_slopes(steps: Array, periodic: bool) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.int64]], Array]:
    """Return columns and weights, each `[n, 3]`, of the slopes of parabolas through three successive values.

    They are of second order, also at the ends. `steps` as for `spline_slopes`; at least three knots.
    """
    n = len(steps) + (0 if periodic else 1)
    columns = np.empty((n, 3), dtype=np.int64)
    weights = np.empty((n, 3))
    for k in range(n):
        middle = k if periodic else min(max(k, 1), n - 2)
        before, after = steps[middle - 1], steps[middle]
        columns[k] = (middle - 1) % n, middle, (middle + 1) % n
        at = 0.0 if k == middle else -before if k < middle else after
        # The derivative at `at` of the parabola through -before, 0 and after.
        weights[k] = (
            (2 * at - after) / (before * (before + after)),
            -(2 * at + before - after) / (before * after),
            (2 * at + before) / (after * (before + after)),
        )
    return columns, weights
