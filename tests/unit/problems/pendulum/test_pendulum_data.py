"""The data of the pendulum problem: motions that obey the constraint, and figures of those to learn from."""

import numpy as np
import pytest
import torch

from pnode_dist.problems.pendulum.data import Motions, generate
from pnode_dist.problems.pendulum.physics import without_air
from tests.unit.problems.pendulum.plain_pendulum import (
    GRAVITY,
    INTERVAL,
    LENGTH,
    PARAMETERS,
    TIMES,
    TRAINING,
    VALIDATION,
    applied_force,
    problem_config,
)
from tests.unit.problems.pendulum.plain_pendulum import motion as by_scipy


def computed(**changes: object) -> Motions:
    config = problem_config(**changes)
    return generate(config, [number * config.interval for number in range(config.times)])


@pytest.fixture(scope="module")
def data() -> Motions:
    return computed()


def test_the_trajectories_are_those_that_scipy_computes(data: Motions) -> None:
    times = np.arange(TIMES) * INTERVAL
    for values, count in ((data.training, TRAINING), (data.validation, VALIDATION)):
        assert values.shape == (TIMES, count, 5)
        for trajectory in np.moveaxis(values, 1, 0):
            x, y, vx, vy, _ = trajectory[0]
            angle = np.arctan2(x, -y)
            turning = (vx * np.cos(angle) + vy * np.sin(angle)) / LENGTH
            np.testing.assert_allclose(trajectory, by_scipy(angle, turning, times), rtol=0, atol=1e-9)


def test_every_state_obeys_the_constraint_and_its_derivatives(data: Motions) -> None:
    values = data.training
    position, velocity, tension = values[..., :2], values[..., 2:4], values[..., 4]
    np.testing.assert_allclose(np.linalg.norm(position, axis=-1), LENGTH, rtol=1e-13)
    np.testing.assert_allclose((position * velocity).sum(axis=-1), 0, atol=1e-13)
    force = np.array([[applied_force(v) for v in row] for row in velocity])
    acceleration = force - tension[..., None] * position
    np.testing.assert_allclose((velocity**2).sum(axis=-1) + (position * acceleration).sum(axis=-1), 0, atol=1e-12)


def test_the_figures_are_those_of_the_training_trajectories(data: Motions) -> None:
    values = data.training
    np.testing.assert_allclose(data.mean, values.mean(axis=(0, 1)), rtol=1e-12)
    np.testing.assert_allclose(data.deviation, values.std(axis=(0, 1)), rtol=1e-12)
    more = computed(validation=VALIDATION + 2)
    assert torch.equal(more.force_mean, data.force_mean)
    assert torch.equal(more.force_deviation, data.force_deviation)
    assert np.array_equal(more.training, data.training)


def test_the_figures_of_the_force_are_those_of_the_true_one_where_samples_are_close() -> None:
    data = computed(interval=0.005)
    velocities = data.training[..., 2:4]
    force = np.array([[applied_force(v) for v in row] for row in velocities])
    np.testing.assert_allclose(data.force_mean, force.mean(axis=(0, 1)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(data.force_deviation, force.std(axis=(0, 1)), rtol=0.02)


def test_without_air_the_same_initial_states_move_otherwise(data: Motions) -> None:
    kept, vacuum = torch.from_numpy(data.validation), torch.from_numpy(data.vacuum)
    torch.testing.assert_close(vacuum[0, :, :4], kept[0, :, :4], rtol=0, atol=1e-14)
    assert (vacuum[-1] - kept[-1]).abs().max() > 0.05
    energy = vacuum[..., 2:4].square().sum(dim=-1) / 2 + GRAVITY * vacuum[..., 1]
    torch.testing.assert_close(energy, energy[:1].expand_as(energy), rtol=1e-10, atol=1e-10)
    assert without_air(PARAMETERS).drag == (0.0, 0.0)


def test_the_seed_chooses_the_trajectories(data: Motions) -> None:
    assert np.array_equal(computed().training, data.training)
    assert not np.allclose(computed(seed=1).training, data.training, atol=1e-2)
