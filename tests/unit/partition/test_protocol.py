"""How lengths are cut into ranges, and what a shape holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnode_dist.partition.protocol import count, even_ranges


@given(st.integers(0, 1000), st.integers(1, 40))
def test_ranges_cover_everything_once_in_order_and_evenly(length: int, parts: int) -> None:
    ranges = even_ranges(length, parts)
    assert len(ranges) == parts
    assert [place for start, stop in ranges for place in range(start, stop)] == list(range(length))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("shape", "entries"), [((), 1), ((3,), 3), ((2, 0, 5), 0), ((2, 3, 4), 24)])
def test_entries_of_a_shape_are_counted(shape: tuple[int, ...], entries: int) -> None:
    assert count(shape) == entries
