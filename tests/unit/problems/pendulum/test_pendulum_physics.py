"""The pendulum's forces, and its motion by PETSc."""

import math

import numpy as np
import pytest

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.pendulum.config import PendulumParameters
from pnode_dist.problems.pendulum.physics import force, initial_motion, motion, states, without_air
from tests.unit.problems.pendulum.plain_pendulum import GRAVITY, LENGTH, PARAMETERS, applied_force
from tests.unit.problems.pendulum.plain_pendulum import motion as by_scipy

VELOCITIES = np.random.default_rng(0).normal(size=(6, 2))


def test_the_force_is_gravity_and_the_drag_of_moving_air() -> None:
    for velocity, found in zip(VELOCITIES, force(VELOCITIES, PARAMETERS), strict=True):
        np.testing.assert_allclose(found, applied_force(velocity), rtol=1e-13)


def test_a_mass_that_moves_with_the_air_feels_gravity_alone() -> None:
    np.testing.assert_allclose(force(np.array([PARAMETERS.wind, 0.0]), PARAMETERS), [0.0, -GRAVITY])


def test_the_states_are_those_of_scipy_for_every_trajectory() -> None:
    initial = np.array([[2.2, -1.0], [-0.4, 3.0], [0.0, 0.0]])
    times = np.array([0.0, 0.3, 0.4, 1.7])
    angles, angular_velocities = np.moveaxis(motion(initial, times, PARAMETERS), -1, 0)
    found = states(angles, angular_velocities, PARAMETERS)
    for number, start in enumerate(initial):
        np.testing.assert_allclose(found[:, number], by_scipy(*start, times), rtol=0, atol=2e-10)


def test_small_swings_without_air_are_harmonic() -> None:
    amplitude, times = 1e-4, np.linspace(0.0, 3.0, 7)
    found = motion(np.array([[amplitude, 0.0]]), times, without_air(PARAMETERS))
    expected = amplitude * np.cos(math.sqrt(GRAVITY / LENGTH) * times)
    np.testing.assert_allclose(found[:, 0, 0], expected, rtol=0, atol=2e-11)


def test_without_air_the_energy_is_kept() -> None:
    motions = motion(np.array([[2.5, 1.0]]), [0.0, 1.0, 5.0], without_air(PARAMETERS))
    angles, angular_velocities = np.moveaxis(motions, -1, 0)
    energy = LENGTH * angular_velocities**2 / 2 - GRAVITY * np.cos(angles)
    np.testing.assert_allclose(energy, energy[0, 0], rtol=1e-10)


def test_at_rest_below_the_pivot_the_tension_holds_the_weight() -> None:
    parameters = PendulumParameters(length=2.0, gravity=10.0, drag=(0.0, 0.0))
    np.testing.assert_allclose(states(np.array(0.0), np.array(0.0), parameters), [0, -2, 0, 0, 5], atol=1e-15)


def test_seed_and_number_choose_the_initial_motion_within_its_bounds() -> None:
    drawn = [initial_motion(1.5, 2.0, LENGTH, seed, number) for seed in (0, 1) for number in range(3)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert all(abs(angle) <= 1.5 and abs(turning) <= 2.0 / LENGTH for angle, turning in drawn)
    assert min(angle for angle, _ in drawn) < 0 < max(angle for angle, _ in drawn)


def test_a_motion_that_cannot_be_followed_is_refused() -> None:
    wild = PendulumParameters(gravity=1e300)
    with pytest.raises(ConfigurationError, match=r"^\[problem\]: .* to 1 s, .*: gravity, drag or wind is too large$"):
        motion(np.array([[1.0, 0.0]]), [0.0, 1.0], wild)
