"""Data of the Robertson problem: computed trajectories, and the ranges and rates of the training trajectories."""

from __future__ import annotations

import math

import numpy as np
import torch

from pnode_dist.problems.common.forecast_parts import Scaling
from pnode_dist.problems.robertson.config import RobertsonConfig
from pnode_dist.problems.robertson.physics import AS_PUBLISHED, Array, initial_concentrations, reference


def decades(config: RobertsonConfig) -> float:
    """Return the decades of time from one sample to the next."""
    return math.log10(config.last / config.first) / (config.times - 1)


def sample_times(config: RobertsonConfig) -> tuple[float, ...]:
    """Return the times of the samples, evenly spaced in their logarithm."""
    exponents = np.linspace(math.log10(config.first), math.log10(config.last), config.times)
    return tuple(float(time) for time in 10.0**exponents)


def generate(config: RobertsonConfig) -> tuple[Array, Array]:
    """Compute the training and validation trajectories of concentrations, `[time, trajectory, species]`.

    Not collective: every rank computes all trajectories, so that they have the same bits on all ranks. Raises
    `ConfigurationError` if the solution of the reactions cannot be integrated.
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
    """Return the scaling that maps each species of `[time, trajectory, species]` to between 0 and 1."""
    lowest, highest = (torch.from_numpy(bound(trajectories, axis=(0, 1))) for bound in (np.min, np.max))
    return Scaling(lowest, highest - lowest)


def fastest_rate(states: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Return the fastest change `[species]` per unit of time of any trajectory from one sample to the next."""
    return (states.diff(dim=0).abs() / times.diff()[:, None, None]).amax(dim=(0, 1))
