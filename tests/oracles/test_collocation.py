"""The collocation methods have scipy's coefficients of Radau's method, and those of the books."""

import math

import numpy as np
import pytest
from scipy.integrate._ivp import radau as scipys

from tests.oracles.collocation import COLLOCATION, gauss, radau


def test_radau_of_three_stages_is_scipy_s() -> None:
    table = COLLOCATION["radau5"]
    np.testing.assert_allclose(table.nodes, scipys.C, atol=1e-14)
    # scipy has A^-1 by its eigenvalues and their vectors.
    inverse = np.linalg.inv(table.matrix)
    mu, pair = scipys.MU_REAL, scipys.MU_COMPLEX
    blocks = np.array([[mu, 0, 0], [0, pair.real, -pair.imag], [0, pair.imag, pair.real]])
    np.testing.assert_allclose(scipys.TI @ inverse @ scipys.T, blocks, atol=1e-11)
    np.testing.assert_allclose(table.weights, table.matrix[-1], atol=1e-15)


def test_one_stage_is_the_midpoint_rule_or_backward_euler() -> None:
    assert gauss(1).matrix[0] == pytest.approx((0.5,))
    assert radau(1).matrix[0] == pytest.approx((1.0,))
    assert (gauss(1).order, radau(1).order) == (2, 1)


def test_gauss_of_two_stages_is_that_of_hammer_and_hollingsworth() -> None:
    table, offset = COLLOCATION["gauss4"], math.sqrt(3) / 6
    np.testing.assert_allclose(table.matrix, [[0.25, 0.25 - offset], [0.25 + offset, 0.25]], atol=1e-15)
    np.testing.assert_allclose(table.weights, [0.5, 0.5], atol=1e-15)
