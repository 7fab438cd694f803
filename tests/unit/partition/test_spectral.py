"""Blocks of a spectrum on any number of ranks: slabs if possible, else the most even pencils."""

from __future__ import annotations

from itertools import product
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from pnode_dist import GridPartition, SpectralPartition
from pnode_dist.errors import ConfigurationError


class OneOf:
    """A rank of any number, for partitions, which need no messages."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size, self.rank = size, rank


def spectrum(shape: tuple[int, ...], ranks: int, half: bool = True) -> SpectralPartition:
    return SpectralPartition(GridPartition(cast("MPI.Intracomm", OneOf(ranks)), shape), half)


@given(st.tuples(*[st.integers(1, 9)] * 3), st.integers(1, 30), st.booleans())
def test_the_default_is_slabs_and_else_the_most_even_pencils(
    shape: tuple[int, int, int], ranks: int, half: bool
) -> None:
    first, second, last = *shape[:2], shape[2] // 2 + 1 if half else shape[2]
    # Points or waves along z and y, then z and x, then y and x.
    cut = [(first, second), (first, last), (second, last)]
    fitting = [
        (p, q)
        for p, q in product(range(1, ranks + 1), repeat=2)
        if p * q == ranks and all(p <= m and q <= n for m, n in cut)
    ]
    if not fitting:
        with pytest.raises(ConfigurationError, match=r"cannot be (split|divided)") as caught:
            spectrum(shape, ranks, half)
        assert "\n" not in str(caught.value)
        return
    found = spectrum(shape, ranks, half).processes
    p, q = found
    assert found in fitting
    assert found == (ranks, 1) if (ranks, 1) in fitting else abs(p - q) == min(abs(p - q) for p, q in fitting)


@pytest.mark.parametrize(
    ("ranks", "half", "processes"),
    [(8, True, (8, 1)), (9, True, (3, 3)), (12, True, (4, 3)), (40, True, (8, 5)), (64, False, (8, 8))],
)
def test_a_cube_of_n_planes_can_have_up_to_n_squared_ranks(ranks: int, half: bool, processes: tuple[int, int]) -> None:
    found = spectrum((8, 8, 8), ranks, half)
    assert found.processes == processes
    for stage in found.stages:
        for blocks in (stage.before, stage.after):
            times = torch.zeros(blocks.shape)
            for rank in range(ranks):
                times[blocks.owned_slices(rank)[:-1]] += 1
            assert bool((times == 1).all())


def test_too_many_ranks_are_one_line() -> None:
    wrong = {
        (100,): r"shape = \(100,\): has 51 wave numbers along x: must have at least one for each of 60 ranks",
        (70, 90): r"has 70 points along y and 46 wave numbers along x: must have at least one of both for each of 60",
        (7, 9, 11): "divided into pencils for 60 ranks: must be p q ranks with p <= 7 and q <= 6",
    }
    for shape, message in wrong.items():
        with pytest.raises(ConfigurationError, match=message) as caught:
            spectrum(shape, 60)
        assert "\n" not in str(caught.value)
