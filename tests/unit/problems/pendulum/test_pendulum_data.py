"""The data of the pendulum problem: motions that obey the constraint, and figures of those to learn from."""

import numpy as np
import pytest
import torch

from pnode_dist import Mesh
from pnode_dist.problems.pendulum.data import PendulumData, generate, partitions
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


def computed(mesh: Mesh, **changes: object) -> PendulumData:
    config = problem_config(**changes)
    return generate(config, *partitions(config, mesh), mesh)


@pytest.fixture(scope="module")
def data() -> PendulumData:
    with Mesh() as mesh:
        return computed(mesh)


def test_the_trajectories_are_those_that_scipy_computes(data: PendulumData) -> None:
    times = np.arange(TIMES) * INTERVAL
    np.testing.assert_allclose(data.times, times)
    for ensemble, count in ((data.training, TRAINING), (data.validation, VALIDATION)):
        assert ensemble.values.shape == (TIMES, count, 5)
        for trajectory in ensemble.values.unbind(1):
            x, y, vx, vy, _ = trajectory[0].numpy()
            angle = np.arctan2(x, -y)
            turning = (vx * np.cos(angle) + vy * np.sin(angle)) / LENGTH
            np.testing.assert_allclose(trajectory, by_scipy(angle, turning, times), rtol=0, atol=1e-9)


def test_every_state_obeys_the_constraint_and_its_derivatives(data: PendulumData) -> None:
    values = data.training.values.numpy()
    position, velocity, tension = values[..., :2], values[..., 2:4], values[..., 4]
    np.testing.assert_allclose(np.linalg.norm(position, axis=-1), LENGTH, rtol=1e-13)
    np.testing.assert_allclose((position * velocity).sum(axis=-1), 0, atol=1e-13)
    force = np.array([[applied_force(v) for v in row] for row in velocity])
    acceleration = force - tension[..., None] * position
    np.testing.assert_allclose((velocity**2).sum(axis=-1) + (position * acceleration).sum(axis=-1), 0, atol=1e-12)


def test_the_figures_are_those_of_the_training_trajectories(data: PendulumData, mesh: Mesh) -> None:
    values = data.training.values.numpy()
    np.testing.assert_allclose(data.mean, values.mean(axis=(0, 1)), rtol=1e-12)
    np.testing.assert_allclose(data.deviation, values.std(axis=(0, 1)), rtol=1e-12)
    more = computed(mesh, validation=VALIDATION + 2)
    assert torch.equal(more.force_mean, data.force_mean)
    assert torch.equal(more.force_deviation, data.force_deviation)
    assert torch.equal(more.training.values, data.training.values)


def test_the_figures_of_the_force_are_those_of_the_true_one_where_samples_are_close(mesh: Mesh) -> None:
    data = computed(mesh, interval=0.005)
    velocities = data.training.values[..., 2:4].numpy()
    force = np.array([[applied_force(v) for v in row] for row in velocities])
    np.testing.assert_allclose(data.force_mean, force.mean(axis=(0, 1)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(data.force_deviation, force.std(axis=(0, 1)), rtol=0.02)


def test_without_air_the_same_initial_states_move_otherwise(data: PendulumData) -> None:
    kept, vacuum = data.validation.values, data.vacuum.values
    torch.testing.assert_close(vacuum[0, :, :4], kept[0, :, :4], rtol=0, atol=1e-14)
    assert (vacuum[-1] - kept[-1]).abs().max() > 0.05
    energy = vacuum[..., 2:4].square().sum(dim=-1) / 2 + GRAVITY * vacuum[..., 1]
    torch.testing.assert_close(energy, energy[:1].expand_as(energy), rtol=1e-10, atol=1e-10)
    assert without_air(PARAMETERS).drag == (0.0, 0.0)


def test_the_seed_chooses_the_trajectories(data: PendulumData, mesh: Mesh) -> None:
    assert torch.equal(computed(mesh).training.values, data.training.values)
    assert not torch.allclose(computed(mesh, seed=1).training.values, data.training.values, atol=1e-2)
