"""Colourings of grid points: no stencil sees a colour twice, every point it sees is found, and no fewer would do."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.colouring import NONE, colour_axis, colour_grid


def seen(point: int, length: int, reach: int, periodic: bool) -> set[int]:
    """The points of an axis that a stencil around `point` sees, one step after the other."""
    found = {point}
    for direction in (-1, 1):
        at = point
        for _ in range(reach):
            at += direction
            if periodic:
                at %= length
            elif not 0 <= at < length:
                break
            found.add(at)
    return found


@given(length=st.integers(1, 40), reach=st.integers(0, 12), periodic=st.booleans())
def test_a_stencil_sees_every_colour_once_at_most(length: int, reach: int, periodic: bool) -> None:
    axis = colour_axis(length, reach, periodic)
    for point in range(length):
        colours = [int(axis.colour[other]) for other in seen(point, length, reach, periodic)]
        assert len(set(colours)) == len(colours)
        assert set(colours) <= set(range(axis.count))


@given(length=st.integers(1, 40), reach=st.integers(0, 12), periodic=st.booleans())
def test_the_points_that_a_stencil_sees_are_listed_by_their_colours(length: int, reach: int, periodic: bool) -> None:
    axis = colour_axis(length, reach, periodic)
    assert axis.source.shape == (length, axis.count)
    for point in range(length):
        listed = {colour: int(other) for colour, other in enumerate(axis.source[point]) if other != NONE}
        assert set(listed.values()) == seen(point, length, reach, periodic)
        assert all(axis.colour[other] == colour for colour, other in listed.items())


def colourable(conflicts: list[set[int]], count: int, colours: tuple[int, ...] = ()) -> bool:
    """Whether `count` colours suffice, by trying all; the first points are already coloured."""
    point = len(colours)
    if point == len(conflicts):
        return True
    taken = {colours[other] for other in conflicts[point] if other < point}
    # A colour that has not been used yet is as good as any other such.
    choices = range(min(count, max(colours, default=-1) + 2))
    return any(colourable(conflicts, count, (*colours, c)) for c in choices if c not in taken)


@pytest.mark.parametrize(("reach", "periodic"), list(product([0, 1, 2, 3], [True, False])))
@pytest.mark.parametrize("length", range(1, 15))
def test_no_colouring_of_an_axis_has_fewer_colours(length: int, reach: int, periodic: bool) -> None:
    around = [seen(point, length, reach, periodic) for point in range(length)]
    conflicts = [{b for b in range(length) if b != a and any({a, b} <= s for s in around)} for a in range(length)]
    count = colour_axis(length, reach, periodic).count
    assert colourable(conflicts, count)
    assert count == 1 or not colourable(conflicts, count - 1)


@pytest.mark.parametrize(
    ("shape", "width", "boundary", "count"),
    [
        ((10, 15), 2, ("periodic", "periodic"), 25),
        ((5, 5), 2, ("periodic", "periodic"), 25),
        ((11, 13), 2, ("replicate", "zero"), 25),
        ((256, 256), 1, ("zero", "zero"), 9),
        # 256 = 84 x 3 + 1 x 4: the segments of one colouring differ by at most one.
        ((256, 256), 1, ("periodic", "periodic"), 16),
        ((256, 256), 3, ("periodic", "periodic"), 64),
        ((255, 258), 1, ("periodic", "periodic"), 9),
        # 8 points can be cut into no two segments of at least 5.
        ((8, 10), 2, ("periodic", "periodic"), 40),
        ((3, 10), 2, ("replicate", "replicate"), 15),
        ((12, 12), (1, 0), ("periodic", "periodic"), 3),
        ((12, 12), 0, ("periodic", "zero"), 1),
        ((1, 512), (0, 2), ("periodic", "replicate"), 5),
        ((512,), 2, ("replicate",), 5),
        ((512,), 2, ("periodic",), 6),
        ((6, 9, 12), 1, ("periodic", "periodic", "periodic"), 27),
        ((64, 64, 64), 1, ("zero", "periodic", "zero"), 36),
        ((4, 5, 7), (1, 0, 2), ("zero", "zero", "zero"), 15),
    ],
)
def test_the_number_of_colours_of_a_grid(
    shape: tuple[int, ...], width: int | tuple[int, ...], boundary: tuple[str, ...], count: int
) -> None:
    assert colour_grid(shape, width, boundary).count == count


@given(
    axes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 3), st.sampled_from(["periodic", "replicate", "zero"])),
        min_size=1,
        max_size=3,
    )
)
def test_a_stencil_on_a_grid_sees_every_colour_once_at_most(axes: list[tuple[int, int, str]]) -> None:
    shape, width, boundary = zip(*axes, strict=True)
    grid = colour_grid(shape, width, boundary)
    colours = list(grid.colours())
    assert len(colours) == grid.count
    numbers = np.empty(shape, dtype=np.int64)
    for point in product(*map(range, shape)):
        numbers[point] = colours.index(tuple(int(axis.colour[at]) for axis, at in zip(grid.axes, point, strict=True)))
    # The corner, the middle and the end of every axis stand for all points.
    for point in product(*({0, n // 2, n - 1} for n in shape)):
        around = (
            sorted(seen(at, n, reach, rule == "periodic")) for at, (n, reach, rule) in zip(point, axes, strict=True)
        )
        box = numbers[np.ix_(*around)]
        assert len(np.unique(box)) == box.size
    assert len(np.unique(numbers)) == grid.count


@pytest.mark.parametrize("width", [-1, (0, -2), (1,), (1, 1, 1)])
def test_a_negative_width_or_one_for_other_axes_is_refused(width: int | tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"stencil: width = \(.*\): must be at least 0, for each of 2 axes"):
        colour_grid((4, 4), width, ("zero", "zero"))
