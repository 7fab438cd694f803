"""Difference operators on a periodic line: the dense matrices of numpy, and the derivatives that they stand for."""

import numpy as np
import pytest
from mpi4py import MPI

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.semilinear.periodic_line import (
    Stencil,
    combined,
    fourth_difference,
    line,
    operator,
    second_difference,
    shortest_wave,
)
from tests.unit.problems.semilinear.plain_semilinear import CASES, linear_matrix

POINTS = 12


def dense(stencil: Stencil, samples: int = 1) -> np.ndarray:
    matrix = operator(line(MPI.COMM_SELF, POINTS), stencil, samples)
    size = samples * POINTS
    return np.asarray(matrix.getValues(range(size), range(size)))


def test_the_matrix_of_a_stencil_is_that_of_shifted_identities() -> None:
    stencil = {-2: 1.5, 0: -0.25, 1: 3.0}
    identity = np.eye(POINTS)
    # Row i has its weight for the offset o in column i + o.
    expected = sum(weight * np.roll(identity, offset, 1) for offset, weight in stencil.items())
    np.testing.assert_array_equal(dense(stencil), expected)


def test_samples_are_not_coupled() -> None:
    stencil = {-1: 1.0, 2: -3.0}
    np.testing.assert_array_equal(dense(stencil, 3), np.kron(np.eye(3), dense(stencil)))


@pytest.mark.parametrize("name", CASES)
def test_the_linear_part_of_an_equation_is_that_of_numpy(name: str) -> None:
    case = CASES[name]
    spacing = case["length"] / POINTS
    stencil = combined((case["second"], second_difference(spacing)), (case["fourth"], fourth_difference(spacing)))
    expected = linear_matrix(name, POINTS)
    np.testing.assert_allclose(dense(stencil), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_the_shortest_wave_is_an_eigenvector() -> None:
    stencil = combined((1.5, second_difference(0.5)), (-0.25, fourth_difference(0.5)))
    wave = (-1.0) ** np.arange(POINTS)
    np.testing.assert_allclose(dense(stencil) @ wave, np.asarray(shortest_wave(stencil) * wave), rtol=1e-13)


@pytest.mark.parametrize(("difference", "power"), [(second_difference, 2), (fourth_difference, 4)])
def test_differences_are_of_second_order(difference: object, power: int) -> None:
    def error(points: int) -> float:
        x = np.arange(points) * (2 * np.pi / points)
        stencil = difference(2 * np.pi / points)  # type: ignore[operator]
        found = sum(weight * np.roll(np.sin(x), -offset) for offset, weight in stencil.items())
        return float(np.abs(found - (-1) ** (power // 2) * np.sin(x)).max())

    assert error(64) / error(128) == pytest.approx(4.0, rel=0.02)


def test_a_line_shorter_than_the_stencil_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="a stencil of 5 points needs as many, and the line has 4"):
        operator(line(MPI.COMM_SELF, 4), fourth_difference(1.0))


def test_a_line_with_fewer_points_than_the_halo_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"3 points cannot be split over 1 rank\(s\) with 5 or more"):
        line(MPI.COMM_SELF, 3, 5)
