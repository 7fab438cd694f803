"""The semilinear equations and initial states on one rank."""

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist.problems.semilinear.config import LineEquation
from pnode_dist.problems.semilinear.equation import Convection, initial_state, linear_stencil
from pnode_dist.problems.semilinear.periodic_line import line
from tests.unit.problems.semilinear.plain_semilinear import CASES, POINTS, convection, linear_matrix

WAVES = LineEquation("waves", 3.0, 1.0, 0.0, 5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_convection_is_that_of_numpy(name: str, scale: float) -> None:
    state = np.random.default_rng(0).standard_normal((3, POINTS))
    found = Convection(line(MPI.COMM_SELF, POINTS), CASES[name]["length"], scale)(
        torch.tensor(0.0), torch.from_numpy(state).view(3, POINTS, 1)
    )
    np.testing.assert_allclose(found.view(3, POINTS), convection(name, state, scale), rtol=1e-12, atol=1e-13)


def test_the_convection_keeps_the_mean() -> None:
    state = torch.randn(POINTS, 1, dtype=torch.float64)
    rate = Convection(line(MPI.COMM_SELF, POINTS), 2.0)(torch.tensor(0.0), state)
    assert abs(rate.sum().item()) < 1e-12 * rate.abs().sum().item()


def test_the_units_of_the_state_do_not_matter() -> None:
    partition, state = line(MPI.COMM_SELF, POINTS), torch.randn(POINTS, 1, dtype=torch.float64)
    physical = Convection(partition, 2.0)(torch.tensor(0.0), state)
    scaled = Convection(partition, 2.0, 4.0)(torch.tensor(0.0), state / 4)
    torch.testing.assert_close(4 * scaled, physical, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_linear_stencil_is_that_of_numpy(name: str) -> None:
    case = CASES[name]
    stencil = linear_stencil(LineEquation("", case["length"], case["second"], case["fourth"], 1), POINTS)
    found = sum(weight * np.roll(np.eye(POINTS), offset, 1) for offset, weight in stencil.items())
    expected = linear_matrix(name)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    assert len(stencil) == (5 if case["fourth"] else 3)


def test_initial_states_are_waves_of_root_mean_square_1() -> None:
    state = initial_state(WAVES, 64, seed=3)
    assert np.sqrt((state**2).mean()) == pytest.approx(1.0, rel=1e-12)
    amplitudes = np.abs(np.fft.rfft(state)) / 64
    assert (amplitudes[1:6] > 1e-3).all()
    assert amplitudes[[0, *range(6, 33)]].max() < 1e-14


def test_seed_and_number_choose_the_initial_state() -> None:
    states = [initial_state(WAVES, 32, seed, number) for seed in (0, 1) for number in (0, 1)]
    assert np.array_equal(states[0], initial_state(WAVES, 32, 0))
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(states) for b in states[:i])


def test_a_finer_grid_has_the_same_initial_state_between_its_points() -> None:
    np.testing.assert_allclose(initial_state(WAVES, 96, 5)[::3], initial_state(WAVES, 32, 5), rtol=0, atol=1e-13)
