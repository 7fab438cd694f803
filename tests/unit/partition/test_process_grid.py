"""How ranks are cut into process grids."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.process_grid import process_grid


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(1, 24),
    st.integers(0, 4),
)
def test_ranks_get_whole_multiples_of_a_stencil_with_the_smallest_inner_surface(
    axes: list[tuple[int, int]], ranks: int, width: int
) -> None:
    shape, steps = [n * step for n, step in axes], [step for _, step in axes]
    fitting = {}
    for grid in product(range(1, ranks + 1), repeat=len(shape)):
        smallest = [n // p * step for (n, step), p in zip(axes, grid, strict=True)]
        if math.prod(grid) == ranks and min(smallest) >= max(width, 1):
            # Each cut across an axis is as large as the other axes make it.
            cuts = [(p - 1) * math.prod(shape[:a] + shape[a + 1 :]) for a, p in enumerate(grid)]
            fitting[grid] = sum(cuts)
    if not fitting:
        message = f"a grid of {' x '.join(map(str, shape))} points cannot be split over {ranks} rank"
        with pytest.raises(ConfigurationError, match=message):
            process_grid(shape, ranks, width, steps)
        return
    assert fitting[process_grid(shape, ranks, width, steps)] == min(fitting.values())


def test_too_many_ranks_are_told_how_many_fit() -> None:
    with pytest.raises(ConfigurationError) as caught:
        process_grid((5, 7), 13, 2)
    message = str(caught.value)
    assert "5 x 7 points" in message
    assert "13 rank" in message
    assert "with 2 or more points along each axis" in message
    assert "use at most 6" in message
    assert "\n" not in message
    assert process_grid((5, 7), 6, 2) == (2, 3)


def test_whole_multiples_leave_room_for_fewer_ranks() -> None:
    assert process_grid((12,), 4, 2) == (4,)
    with pytest.raises(ConfigurationError, match=r"with 4 or more points along each axis .* use at most 3, or fewer"):
        process_grid((12,), 4, 2, (4,))


@pytest.mark.parametrize(
    ("shape", "ranks", "grid"),
    [
        ((100, 10), 4, (4, 1)),
        ((10, 100), 4, (1, 4)),
        ((10, 10), 2, (2, 1)),
        ((64, 64, 64), 8, (2, 2, 2)),
        ((8, 8, 512), 16, (1, 1, 16)),
        ((512, 8, 8), 6, (6, 1, 1)),
        ((16, 32, 64), 4, (1, 2, 2)),
        ((64, 64, 8), 4, (2, 2, 1)),
        ((10, 10, 10), 2, (2, 1, 1)),
    ],
)
def test_long_axes_are_cut_first(shape: tuple[int, ...], ranks: int, grid: tuple[int, ...]) -> None:
    assert process_grid(shape, ranks, 1) == grid
