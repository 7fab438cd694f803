"""The data of the pendulum problem: computed trajectories, and what is known of those to learn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.batch import BatchPartition
from pnode_dist.problems.common.ensemble import Ensemble, spread
from pnode_dist.problems.pendulum.config import PendulumConfig, PendulumParameters
from pnode_dist.problems.pendulum.physics import COMPONENTS, Array, initial_motion, motion, states, without_air


@dataclass(frozen=True)
class PendulumData:
    """This rank's part of the trajectories, in SI units for a unit mass; see `pnode_dist.problems.pendulum.physics`.

    `mean` and `deviation` `[component]` are over the `training` trajectories, and so are `force_mean` and
    `force_deviation` `[2]` of the force on the mass, as differences of their samples tell it. `validation` is held out;
    `vacuum` are motions from the same initial states without air. `times` are those of the samples. All is float64.
    """

    training: Ensemble
    validation: Ensemble
    vacuum: Ensemble
    mean: torch.Tensor
    deviation: torch.Tensor
    force_mean: torch.Tensor
    force_deviation: torch.Tensor
    times: tuple[float, ...]


def partitions(config: PendulumConfig, mesh: Mesh) -> tuple[BatchPartition, BatchPartition]:
    """How the training and the validation trajectories lie on the state ranks. Collective on the state ranks."""
    shape = (len(COMPONENTS),)
    return BatchPartition(mesh, config.trajectories, shape), BatchPartition(mesh, config.validation, shape)


def generate(config: PendulumConfig, training: BatchPartition, validation: BatchPartition, mesh: Mesh) -> PendulumData:
    """Compute all trajectories. Collective on the state ranks.

    Raises `ConfigurationError` on all ranks for a motion that cannot be followed.
    """
    times = tuple(number * config.interval for number in range(config.times))

    initial = np.stack(
        [
            initial_motion(config.largest_angle, config.largest_speed, config.length, config.seed, number)
            for number in range(config.trajectories + config.validation)
        ]
    )

    def computed(chosen: Array, parameters: PendulumParameters, partition: BatchPartition) -> Ensemble:
        # All ranks compute all: so trajectories have the same bits at every number of ranks.
        angles, angular_velocities = np.moveaxis(motion(chosen, times, parameters), -1, 0)
        return spread(states(angles, angular_velocities, parameters), partition)

    held_out = initial[config.trajectories :]
    learnt = computed(initial[: config.trajectories], config.parameters, training)
    unseen = computed(held_out, config.parameters, validation)
    vacuum = computed(held_out, without_air(config.parameters), validation)
    moments = _moments(learnt.values, training, mesh)
    force_moments = _moments(_observed_force(learnt.values, config.interval), training, mesh)
    return PendulumData(learnt, unseen, vacuum, *moments, *force_moments, times)


def _observed_force(values: torch.Tensor, interval: float) -> torch.Tensor:
    """The force `[time - 1, trajectory_local, 2]` between samples: what changes the velocity and is not the rod."""
    pull = values[..., 4:] * values[..., :2]
    change = (values[1:, :, 2:4] - values[:-1, :, 2:4]) / interval
    return change + (pull[1:] + pull[:-1]) / 2


def _moments(values: torch.Tensor, partition: BatchPartition, mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """The means and standard deviations over samples and the trajectories of all ranks. Collective on the state
    ranks."""
    mean = _mean(values, partition, mesh)
    return mean, _mean((values - mean).square(), partition, mesh).sqrt()


def _mean(values: torch.Tensor, partition: BatchPartition, mesh: Mesh) -> torch.Tensor:
    """The means over samples and the trajectories of all ranks. Collective on the state ranks."""
    total: torch.Tensor = mesh.sum(values.sum(dim=(0, 1)), over="state")
    return total / (values.shape[0] * partition.global_shape[0])
