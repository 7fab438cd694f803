"""The division of the steps of a solve into segments."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pnode_dist.ode.segments import Segment, divided_into_segments
from pnode_dist.ode.time_grid import time_grid

INTERVALS = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@given(INTERVALS, st.integers(1, 12))
def test_segments_end_at_all_outputs_and_are_as_few_as_possible(counts: list[int], most: int) -> None:
    times = [0.0]
    for count in counts:
        times.append(times[-1] + count)
    grid = time_grid(times, 1.0)
    found = divided_into_segments(grid, most)
    lengths = [last - first for first, last in pairwise(found.bounds)]
    assert (found.bounds[0], found.bounds[-1]) == (0, grid.steps)
    assert set(grid.outputs) <= set(found.bounds)
    assert 1 <= min(lengths) <= max(lengths) == found.longest <= most
    assert found.segments == sum(-(-count // most) for count in counts)


def test_a_segment_has_the_times_of_its_steps() -> None:
    grid = divided_into_segments(time_grid([0.0, 1.0, 1.5], 0.25), 3)
    assert grid[1] == Segment(2, (0.5, 0.75), (0.25, 0.25))
    assert grid.start(2) == 1.0
    starts, sizes = grid[1].tensors()
    assert (starts.tolist(), sizes.tolist()) == ([0.5, 0.75], [0.25, 0.25])
