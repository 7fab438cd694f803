"""The variances of covariances: their diagonals, also those of a field's covariance near boundaries."""

from __future__ import annotations

import math

import pytest
import torch
from mpi4py import MPI

from pnode_dist import ConfigurationError, GridPartition
from pnode_dist.inverse import Covariance, Dense, Diagonal, GridCovariance
from tests.oracles.assimilation import matern_root
from tests.oracles.right_hand_sides import random


@pytest.mark.parametrize(
    ("shape", "periodic"),
    [((7,), [False]), ((8,), [True]), ((5, 6), [False, True]), ((4, 5, 3), [True, False, False])],
)
def test_the_variances_of_a_field_are_the_diagonal_of_its_covariance(
    shape: tuple[int, ...], periodic: list[bool]
) -> None:
    rules = tuple("periodic" if wraps else "replicate" for wraps in periodic)
    partition = GridPartition(MPI.COMM_SELF, shape, 2, rules)
    deviations, length, spacing = (0.3, 2.0), 0.5, [0.2, 0.25, 0.3][: len(shape)]
    covariance = GridCovariance(partition, deviations, length, spacing)
    root = matern_root(shape, [length / width for width in spacing], periodic)
    diagonal = (root @ root.T).diagonal().view(shape)
    wanted = torch.stack([deviation**2 * diagonal for deviation in deviations], dim=-1)
    found = covariance.variances(random(3, *shape, 2))
    assert found.shape == (3, *shape, 2)
    torch.testing.assert_close(found, wanted.expand(3, *shape, 2), rtol=1e-11, atol=0)


def test_the_variances_of_a_matrix_are_its_diagonal() -> None:
    factor = random(4, 4)
    matrix = factor @ factor.T + torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(Dense(matrix).variances(random(2, 2)), matrix.diagonal().view(2, 2))


def test_one_variance_is_that_of_every_entry() -> None:
    found = Diagonal(0.25).variances(random(2, 3))
    assert found.tolist() == [[0.25] * 3] * 2


class Nameless(Covariance):
    """A covariance without variances."""

    def root(self, x: torch.Tensor) -> torch.Tensor:
        return math.e * x

    def root_solve(self, x: torch.Tensor) -> torch.Tensor:
        return x / math.e


def test_a_covariance_without_variances_is_named() -> None:
    with pytest.raises(ConfigurationError, match="Nameless does not define variances"):
        Nameless().variances(random(2))
