"""The data of the Robertson problem: computed trajectories, and the ranges and rates of those to learn from."""

from __future__ import annotations

import math

import numpy as np
import torch

from pnode_dist.problems.common.forecast_parts import Scaling
from pnode_dist.problems.robertson.config import RobertsonConfig
from pnode_dist.problems.robertson.physics import AS_PUBLISHED, Array, initial_concentrations, reference


def decades(config: RobertsonConfig) -> float:
    """The decades of time from one sample to the next."""
    return math.log10(config.last / config.first) / (config.times - 1)


def sample_times(config: RobertsonConfig) -> tuple[float, ...]:
    """The times of the samples, evenly spaced in their logarithm."""
    exponents = np.linspace(math.log10(config.first), math.log10(config.last), config.times)
    return tuple(float(time) for time in 10.0**exponents)


def generate(config: RobertsonConfig) -> tuple[Array, Array]:
    """Training and validation trajectories `[time, trajectory, species]`, concentrations.

    Not collective: every rank computes all, so that they have the same bits everywhere. Raises `ConfigurationError` for
    reactions whose solution cannot be followed.
    """
    times = sample_times(config)
    drawn = np.stack(
        [
            initial_concentrations(config.lowest, config.highest, config.seed, number)
            for number in range(config.trajectories + config.validation - 1)
        ]
    )
    held_out = np.concatenate([[AS_PUBLISHED], drawn[config.trajectories :]])
    return reference(drawn[: config.trajectories], times, config.rates), reference(held_out, times, config.rates)


def range_of(trajectories: Array) -> Scaling:
    """The units in which each species of `[time, trajectory, species]` lies between 0 and 1."""
    lowest, highest = (torch.from_numpy(bound(trajectories, axis=(0, 1))) for bound in (np.min, np.max))
    return Scaling(lowest, highest - lowest)


def fastest_rate(states: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """The fastest change `[species]` per unit of time of any trajectory from one sample to the next."""
    return (states.diff(dim=0).abs() / times.diff()[:, None, None]).amax(dim=(0, 1))
