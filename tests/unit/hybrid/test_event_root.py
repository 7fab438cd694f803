"""The zero in a bracket is at most the tolerance after the sign has changed, in about as many steps as bisection."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnode_dist.hybrid.event_root import right_end


def located(root: float, power: int, slope: float, backward: bool, tolerance: float) -> tuple[float, int]:
    """The right end for slope * (x - root)^power on [0, 1], and the number of evaluations."""
    count = 0

    def value(x: float) -> float:
        nonlocal count
        count += 1
        return slope * math.copysign(abs(x - root) ** power, x - root)

    begin, end = (1.0, 0.0) if backward else (0.0, 1.0)
    before, after = (begin, value(begin)), (end, value(end))
    count = 0
    return right_end(value, before, after, tolerance), count


@given(
    root=st.floats(1e-3, 1 - 1e-3),
    power=st.sampled_from([1, 3, 5]),
    slope=st.sampled_from([-1e3, 1.0, -1e-3]),
    backward=st.booleans(),
    tolerance=st.sampled_from([1e-3, 1e-9, 1e-14]),
)
def test_the_end_is_beyond_the_zero_by_at_most_the_tolerance(
    root: float, power: int, slope: float, backward: bool, tolerance: float
) -> None:
    found, count = located(root, power, slope, backward, tolerance)
    beyond = root - found if backward else found - root
    # Powers of differences below 1e-65 underflow to zero: those are zeros too.
    assert -1e-64 <= beyond <= tolerance * (1 + 1e-12) + 1e-64
    assert count <= math.ceil(math.log2(1 / tolerance)) + 2


def test_a_simple_zero_takes_far_fewer_evaluations_than_bisection() -> None:
    count = 0

    def value(x: float) -> float:
        nonlocal count
        count += 1
        return math.exp(x) - 1.7

    found = right_end(value, (0.0, value(0.0)), (1.0, value(1.0)), 1e-15)
    assert found == pytest.approx(math.log(1.7), abs=1e-15)
    assert count - 2 <= 12


def test_a_zero_at_the_end_and_a_bracket_of_no_length_are_returned_as_they_are() -> None:
    assert right_end(lambda x: x - 1, (0.0, -1.0), (1.0, 0.0), 1e-12) == 1.0
    assert right_end(lambda x: x, (1.0, -1.0), (1.0, 1.0), 1e-12) == 1.0
