"""The data of the Robertson problem: computed trajectories, scaled to between 0 and 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.batch import BatchPartition
from pnode_dist.problems.common.ensemble import Ensemble, spread
from pnode_dist.problems.robertson.config import RobertsonConfig
from pnode_dist.problems.robertson.physics import AS_PUBLISHED, SPECIES, initial_concentrations, reference


@dataclass(frozen=True)
class RobertsonData:
    """This rank's part of the trajectories, scaled concentrations (y - `lowest`) / `width`.

    `lowest` and `width` `[species]` are the minimum and the range over the `training` trajectories and all their
    samples; `validation` is held out. `rate` `[species]` is the fastest change per unit of time of any scaled training
    trajectory from one sample to the next. `times` are those of the samples, `decades` apart in log10. All is float64.
    """

    training: Ensemble
    validation: Ensemble
    lowest: torch.Tensor
    width: torch.Tensor
    rate: torch.Tensor
    times: tuple[float, ...]
    decades: float

    def physical(self, values: torch.Tensor) -> torch.Tensor:
        """Scaled values as concentrations, in float64."""
        return values.double() * self.width + self.lowest


def decades(config: RobertsonConfig) -> float:
    """The decades of time from one sample to the next."""
    return math.log10(config.last / config.first) / (config.times - 1)


def sample_times(config: RobertsonConfig) -> tuple[float, ...]:
    """The times of the samples, evenly spaced in their logarithm."""
    exponents = np.linspace(math.log10(config.first), math.log10(config.last), config.times)
    return tuple(float(time) for time in 10.0**exponents)


def partitions(config: RobertsonConfig, mesh: Mesh) -> tuple[BatchPartition, BatchPartition]:
    """How the training and the validation trajectories lie on the state ranks. Collective on the state ranks."""
    shape = (len(SPECIES),)
    return BatchPartition(mesh, config.trajectories, shape), BatchPartition(mesh, config.validation, shape)


def generate(
    config: RobertsonConfig, training: BatchPartition, validation: BatchPartition, mesh: Mesh
) -> RobertsonData:
    """Compute and scale all trajectories. Collective on the world.

    Raises `ConfigurationError` on all ranks for reactions whose solution cannot be followed.
    """
    times = sample_times(config)

    drawn = np.stack(
        [
            initial_concentrations(config.lowest, config.highest, config.seed, number)
            for number in range(config.trajectories + config.validation - 1)
        ]
    )
    # All ranks compute all: so trajectories have the same bits at every number of ranks.
    learnt = spread(reference(drawn[: config.trajectories], times, config.rates), training)
    held_out = np.concatenate([[AS_PUBLISHED], drawn[config.trajectories :]])
    unseen = spread(reference(held_out, times, config.rates), validation)
    lowest, highest = -_highest(-learnt.values, mesh), _highest(learnt.values, mesh)
    width = highest - lowest
    scaled, held = (Ensemble(each.partition, (each.values - lowest) / width) for each in (learnt, unseen))
    spacing = torch.tensor(np.diff(times))[:, None, None]
    rate = _highest((scaled.values[1:] - scaled.values[:-1]).abs() / spacing, mesh)
    return RobertsonData(scaled, held, lowest, width, rate, times, decades(config))


def _highest(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The largest `[species]` of `values` `[time, trajectory_local, species]` on all ranks. Collective on the world."""
    # A rank may own no trajectory.
    least = torch.full((1, values.shape[-1]), -math.inf, dtype=values.dtype)
    return mesh.max(torch.cat([values.flatten(0, 1), least]).amax(dim=0))
