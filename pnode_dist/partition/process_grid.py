"""The numbers of ranks along the axes of a grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pnode_dist.errors import ConfigurationError


def process_grid(
    shape: Sequence[int], size: int, width: int, multiple_of: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the numbers of ranks along the axes with the smallest inner surface, and blocks at least `width` wide.

    Blocks have whole multiples of `multiple_of` points along each axis, by default of 1, and so must the shape. Of
    equal surfaces the one with fewer cuts along the last axis is chosen, whose points are contiguous in memory. Raises
    `ConfigurationError` if the grid is too small for `size` ranks.
    """
    least = max(width, 1)
    steps = (1,) * len(shape) if multiple_of is None else tuple(multiple_of)
    # In units of the steps: the length of each axis, and the smallest length of a block.
    lengths = [n // step for n, step in zip(shape, steps, strict=True)]
    shortest = [-(-least // step) for step in steps]
    most = [n // block for n, block in zip(lengths, shortest, strict=True)]
    choices = [grid for grid in _factors(size, len(lengths)) if all(p <= m for p, m in zip(grid, most, strict=True))]
    if not choices:
        raise ConfigurationError(
            f"a grid of {' x '.join(map(str, shape))} points cannot be split over {size} rank(s) with "
            f"{_each([block * step for block, step in zip(shortest, steps, strict=True)])} or more points along "
            "each axis (the width of the halo): "
            + (f"use at most {math.prod(most)}, or fewer" if all(most) else "it needs a larger grid or a narrower halo")
        )
    points = math.prod(shape)
    return min(
        choices,
        key=lambda grid: (sum((p - 1) * (points // n) for p, n in zip(grid, shape, strict=True)), grid[::-1]),
    )


def _factors(size: int, axes: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to write `size` as a product of `axes` numbers."""
    if axes == 1:
        yield (size,)
        return
    for first in range(1, size + 1):
        if size % first == 0:
            for others in _factors(size // first, axes - 1):
                yield (first, *others)


def _each(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else " x ".join(map(str, numbers))
