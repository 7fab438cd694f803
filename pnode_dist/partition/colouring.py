"""Colouring of grid points: no stencil contains two points of one colour.

The columns of a sparse Jacobian that share no row can be found from one product J v (A. R. Curtis, M. J. D. Powell,
J. K. Reid: On the estimation of sparse Jacobian matrices, J. Inst. Maths Applics 13 (1974)); which columns may go
together is a colouring of a graph (T. F. Coleman, J. J. More, SIAM J. Numer. Anal. 20 (1983)). For box-shaped
stencils on a regular grid the product of one colouring an axis serves (D. Goldfarb, Ph. L. Toint, Math. Comp. 43
(1984)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.protocol import even_ranges

Integers = npt.NDArray[np.int64]
NONE = -1


@dataclass(frozen=True)
class AxisColouring:
    """Colours 0 ... `count` - 1 along an axis of n points.

    `colour` `[n]` is the colour of each point. `source` `[n, count]` is the one point of each colour that the
    stencil around a point reaches, or `NONE`.
    """

    count: int
    colour: Integers
    source: Integers


def colour_axis(length: int, reach: int, periodic: bool) -> AxisColouring:
    """Return the colouring of `length` points with the fewest colours, for a stencil of `reach` points to each side.

    Points of one colour are at least 2 `reach` + 1 apart, on a periodic axis also around the end. A periodic axis thus
    has at most floor(length / (2 reach + 1)) points of a colour. It is cut into so many equal segments, each coloured
    from 0 on, with ceil(length / segments) colours. Any other axis has min(length, 2 reach + 1) colours.
    """
    period = 2 * reach + 1
    if periodic:
        segments = even_ranges(length, max(length // period, 1))
        colour = np.concatenate([np.arange(stop - start) for start, stop in segments])
    else:
        colour = np.arange(length) % period
    count = int(colour.max()) + 1
    source = np.full((length, count), NONE, dtype=np.int64)
    # A reach beyond half of a periodic axis, or beyond all of another one, adds no points.
    furthest = min(reach, length // 2 if periodic else length - 1)
    point = np.arange(length)[:, None]
    seen = point + np.arange(-furthest, furthest + 1)
    inside = np.broadcast_to(True, seen.shape) if periodic else (seen >= 0) & (seen < length)
    seen %= length
    source[np.broadcast_to(point, seen.shape)[inside], colour[seen[inside]]] = seen[inside]
    return AxisColouring(count, colour, source)


@dataclass(frozen=True)
class GridColouring:
    """The colouring of a grid: one colour for each axis, the first axis first."""

    axes: tuple[AxisColouring, ...]

    @property
    def count(self) -> int:
        """The number of colours."""
        return math.prod(axis.count for axis in self.axes)

    def colours(self) -> Iterator[tuple[int, ...]]:
        """Yield all colours, with that of the last axis changing fastest."""
        return product(*(range(axis.count) for axis in self.axes))


def colour_grid(shape: Sequence[int], width: int | Sequence[int], boundary: Sequence[str | float]) -> GridColouring:
    """Return the colouring of a grid of `shape`, for stencils of `width` points, one number or one for each axis.

    `boundary` is the rule of each axis, as in `GridPartition`: `periodic` ones are coloured around the end. A stencil
    may reach further than the grid. Where the lengths of periodic axes are multiples of 2 w + 1, and on other axes
    that are longer, the number of colours is the product of the 2 w + 1: as many as points are seen at once, hence the
    fewest.
    Raises `ConfigurationError` for a negative width, or one that is not for these axes.
    """
    reach = (width,) * len(shape) if isinstance(width, int) else tuple(width)
    if len(reach) != len(shape) or min(reach) < 0:
        raise ConfigurationError(f"stencil: width = {reach}: must be at least 0, for each of {len(shape)} axes")
    return GridColouring(
        tuple(
            colour_axis(length, furthest, rule == "periodic")
            for length, furthest, rule in zip(shape, reach, boundary, strict=True)
        )
    )
