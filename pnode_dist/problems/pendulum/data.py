"""Data of the pendulum problem: computed motions, and the means and deviations of the training trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pnode_dist.problems.pendulum.config import PendulumConfig, PendulumParameters
from pnode_dist.problems.pendulum.physics import Array, initial_motion, motion, states, without_air


@dataclass(frozen=True)
class Motions:
    """All motions `[time, trajectory, component]`, in SI units for a unit mass; see the module `physics`.

    `validation` is held out; `vacuum` are motions without air from the same initial states. `mean` and `deviation`
    `[component]` are over the `training` trajectories. `force_mean` and `force_deviation` `[2]` are those of the force
    on the mass, estimated from differences of the training samples.
    """

    training: Array
    validation: Array
    vacuum: Array
    mean: torch.Tensor
    deviation: torch.Tensor
    force_mean: torch.Tensor
    force_deviation: torch.Tensor


def generate(config: PendulumConfig, times: Sequence[float]) -> Motions:
    """Compute all motions. Not collective: every rank computes all, so that they have the same bits on all ranks.

    Raises `ConfigurationError` if a motion cannot be integrated.
    """
    initial = np.stack(
        [
            initial_motion(config.largest_angle, config.largest_speed, config.length, config.seed, number)
            for number in range(config.trajectories + config.validation)
        ]
    )

    def computed(chosen: Array, parameters: PendulumParameters) -> Array:
        angles, angular_velocities = np.moveaxis(motion(chosen, times, parameters), -1, 0)
        return states(angles, angular_velocities, parameters)

    held_out = initial[config.trajectories :]
    training = computed(initial[: config.trajectories], config.parameters)
    learnt = torch.from_numpy(training)
    return Motions(
        training,
        computed(held_out, config.parameters),
        computed(held_out, without_air(config.parameters)),
        *_moments(learnt),
        *_moments(_observed_force(learnt, config.interval)),
    )


def _observed_force(values: torch.Tensor, interval: float) -> torch.Tensor:
    """Estimate the force `[time - 1, trajectory, 2]` between samples.

    It is the rate of change of the velocity without the pull of the rod.
    """
    pull = values[..., 4:] * values[..., :2]
    change = values[..., 2:4].diff(dim=0) / interval
    return change + (pull[1:] + pull[:-1]) / 2


def _moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means and standard deviations over samples and trajectories."""
    mean = values.mean(dim=(0, 1))
    return mean, (values - mean).square().mean(dim=(0, 1)).sqrt()
