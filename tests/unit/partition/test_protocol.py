"""How lengths are cut into ranges, and ranks into process grids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.grid import process_grid
from pnode_dist.partition.protocol import count, even_ranges


@given(st.integers(0, 1000), st.integers(1, 40))
def test_ranges_cover_everything_once_in_order_and_evenly(length: int, parts: int) -> None:
    ranges = even_ranges(length, parts)
    assert len(ranges) == parts
    assert [place for start, stop in ranges for place in range(start, stop)] == list(range(length))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 24), st.integers(0, 4))
def test_a_process_grid_gives_every_rank_a_stencil_width_with_the_shortest_inner_edges(
    ny: int, nx: int, ranks: int, width: int
) -> None:
    least = max(width, 1)
    fitting = {
        (py, ranks // py): (py - 1) * nx + (ranks // py - 1) * ny
        for py in range(1, ranks + 1)
        if ranks % py == 0 and ny // py >= least and nx // (ranks // py) >= least
    }
    if not fitting:
        with pytest.raises(ConfigurationError, match=f"{ny} x {nx} points cannot be split over {ranks} rank"):
            process_grid((ny, nx), ranks, width)
        return
    chosen = process_grid((ny, nx), ranks, width)
    assert fitting[chosen] == min(fitting.values())


def test_too_many_ranks_are_told_how_many_fit() -> None:
    with pytest.raises(ConfigurationError) as caught:
        process_grid((5, 7), 13, 2)
    message = str(caught.value)
    assert "5 x 7 points" in message
    assert "13 rank" in message
    assert "use at most 6" in message
    assert "\n" not in message
    assert process_grid((5, 7), 6, 2) == (2, 3)


@pytest.mark.parametrize(("shape", "entries"), [((), 1), ((3,), 3), ((2, 0, 5), 0), ((2, 3, 4), 24)])
def test_entries_of_a_shape_are_counted(shape: tuple[int, ...], entries: int) -> None:
    assert count(shape) == entries
