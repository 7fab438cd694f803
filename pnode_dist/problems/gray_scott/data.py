"""Data of the Gray-Scott problem: trajectories computed from the equations by PETSc's adaptive integrator."""

from __future__ import annotations

import math

import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common import reference as tight
from pnode_dist.problems.common.forecast_data import Samples
from pnode_dist.problems.gray_scott.config import GrayScottConfig
from pnode_dist.problems.gray_scott.physics import GrayScott, initial_state

_PREFIX = "gray_scott_data_"


def trajectories(config: GrayScottConfig, partition: GridPartition) -> torch.Tensor:
    """Compute all trajectories `[trajectory, time, ny_local, nx_local, 2]`, training trajectories first.

    Collective on the partition's communicator. Raises `ConfigurationError` on all ranks if the solution of the
    equations cannot be integrated.
    """
    equations = GrayScott(partition, config.parameters)
    initial = [
        initial_state(partition, config.seed, number) for number in range(config.trajectories + config.validation)
    ]
    return torch.stack([reference(equations, state, config.times, config.interval) for state in initial])


def rate_of_change(samples: Samples, mesh: Mesh) -> torch.Tensor:
    """Return the root mean square `[species]` of the rate of change from one sample to the next.

    Collective on the state ranks.
    """
    changes = samples.values.diff(dim=1) / samples.times.diff()[:, None, None, None]
    squares: torch.Tensor = mesh.sum(changes.square().sum(dim=(0, 1, 2, 3)), over="state")
    cells = math.prod(samples.partition.global_shape[:-1])
    return (squares / (changes.shape[0] * changes.shape[1] * cells)).sqrt()


def reference(equations: GrayScott, initial: torch.Tensor, times: int, interval: float) -> torch.Tensor:
    """Return the states `[times, ny_local, nx_local, 2]` at 0, `interval`, ..., to a tight tolerance.

    `initial` is the state at 0. Collective on the partition's communicator. Raises `ConfigurationError` on all ranks if
    step control fails.
    """
    try:
        return tight.reference(equations, initial, times, interval, equations.partition, _PREFIX)
    except tight.NotIntegrableError as error:
        raise ConfigurationError(f"[problem]: the equations {error}: diffusion, feed or kill is too large") from None
