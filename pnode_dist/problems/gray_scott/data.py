"""The data of the Gray-Scott problem: trajectories that PETSc's own adaptive integrator computes from the equations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common import reference as tight
from pnode_dist.problems.gray_scott.config import GrayScottConfig
from pnode_dist.problems.gray_scott.physics import GrayScott, initial_state

_PREFIX = "gray_scott_data_"


@dataclass(frozen=True)
class Trajectories:
    """This rank's part of all trajectories, and what is known of the whole of those to learn from.

    `values` `[trajectory, time, ny_local, nx_local, species]` are normalised by the `mean` and `deviation`
    `[species]` of the first `training` trajectories; the others are held out. `rate` `[species]` is the root mean
    square of what the normalised states change per unit of time from one sample to the next. All are float64.
    """

    values: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor
    rate: torch.Tensor
    training: int
    interval: float

    def physical(self, values: torch.Tensor) -> torch.Tensor:
        """Normalised values as concentrations, in float64."""
        return values.double() * self.deviation + self.mean

    @property
    def times(self) -> int:
        """Samples of a trajectory."""
        return self.values.shape[1]


def generate(config: GrayScottConfig, partition: GridPartition, mesh: Mesh) -> Trajectories:
    """Compute and normalise all trajectories. Collective on the state ranks.

    Raises `ConfigurationError` on all ranks for equations whose solution cannot be followed, and for a grid so coarse
    that all trajectories to learn from are at rest on it.
    """
    equations = GrayScott(partition, config.parameters)
    count = config.trajectories + config.validation
    states = torch.stack(
        [
            reference(equations, initial_state(partition, config.seed, number), config.times, config.interval)
            for number in range(count)
        ]
    )
    learnt = states[: config.trajectories]
    mean = _mean(learnt, partition, mesh)
    deviation = _mean((learnt - mean).square(), partition, mesh).sqrt()
    if not bool((deviation > 0).all()):
        raise ConfigurationError(
            f"[problem] shape = {list(config.shape)}: too coarse: the initial states' bumps lie between its points"
        )
    values = (states - mean) / deviation
    changes = (values[: config.trajectories, 1:] - values[: config.trajectories, :-1]) / config.interval
    rate = _mean(changes.square(), partition, mesh).sqrt()
    return Trajectories(values, mean, deviation, rate, config.trajectories, config.interval)


def reference(equations: GrayScott, initial: torch.Tensor, times: int, interval: float) -> torch.Tensor:
    """The states at 0, `interval`, ..., `[times, ny_local, nx_local, 2]`, from `initial` on, to a tight tolerance.
    Collective on the partition's communicator.

    Raises `ConfigurationError` on all ranks where the step control gives up.
    """
    try:
        return tight.reference(equations, initial, times, interval, equations.partition, _PREFIX)
    except tight.NotIntegrableError as error:
        raise ConfigurationError(f"[problem]: the equations {error}: diffusion, feed or kill is too large") from None


def _mean(values: torch.Tensor, partition: GridPartition, mesh: Mesh) -> torch.Tensor:
    """The mean `[species]` over all trajectories, times and cells of all ranks. Collective on the state ranks."""
    cells = partition.shape[0] * partition.shape[1]
    total: torch.Tensor = mesh.sum(values.sum(dim=(0, 1, 2, 3)), over="state") / (
        values.shape[0] * values.shape[1] * cells
    )
    return total
