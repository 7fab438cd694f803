"""The Gray-Scott equations on a partitioned grid, and their initial states. Neither requires data files."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pnode_dist.exchange import halo
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.gray_scott.config import GrayScottParameters

SPECIES = ("u", "v")
_BUMPS = (4, 8)
_HALF_WIDTH = (0.05, 0.1)
_INSIDE = (0.5, 0.25)


class GrayScott(nn.Module):
    """The equations of `GrayScottParameters` with the 5-point Laplacian, as a right-hand side for `NeuralODE`.

    A state is `[..., ny_local, nx_local, 2]`, the species u and v, of any floating type. `diffusion_u`, `diffusion_v`,
    `feed` and `kill` are float64 parameters, so that the coefficients can be fitted. The boundary rule of the partition
    applies beyond the edges of the grid. Collective on the partition's communicator.
    """

    def __init__(self, partition: GridPartition, parameters: GrayScottParameters | None = None) -> None:
        super().__init__()
        chosen = parameters or GrayScottParameters()
        self.partition = partition
        self.spacing = tuple(length / points for length, points in zip(chosen.domain, partition.shape, strict=True))
        self.diffusion_u = _scalar(chosen.diffusion[0])
        self.diffusion_v = _scalar(chosen.diffusion[1])
        self.feed = _scalar(chosen.feed)
        self.kill = _scalar(chosen.kill)

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return du/dt and dv/dt in the state's shape; `t` is unused. Collective on the partition's communicator."""
        wide = halo(state, self.partition, 1)
        dy, dx = self.spacing
        along_y = wide[..., 2:, 1:-1, :] - 2 * state + wide[..., :-2, 1:-1, :]
        along_x = wide[..., 1:-1, 2:, :] - 2 * state + wide[..., 1:-1, :-2, :]
        laplacian = along_y / dy**2 + along_x / dx**2
        u, v = state.unbind(-1)
        reaction = u * v * v
        u_rate = self.diffusion_u * laplacian[..., 0] - reaction + self.feed * (1 - u)
        v_rate = self.diffusion_v * laplacian[..., 1] + reaction - (self.feed + self.kill) * v
        return torch.stack([u_rate, v_rate], dim=-1)


def _scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


def initial_state(partition: GridPartition, seed: int, number: int = 0) -> torch.Tensor:
    """Return this rank's block `[ny_local, nx_local, 2]`, float64, of the initial state for `seed` and `number`.

    The state is u = 1, v = 0 at rest, with a few soft-edged rectangles of u = 1/2, v = 1/4 that are 10 to 20 % of the
    domain wide. Their relative positions in the domain depend neither on the grid nor on the ranks, and the values have
    the same bits for every number of ranks and every block. Not collective.
    """
    generator = np.random.default_rng([seed, number])
    count = int(generator.integers(*_BUMPS))
    centres = generator.uniform(0.0, 1.0, (count, 2))
    half_widths = generator.uniform(*_HALF_WIDTH, (count, 2))
    outside = torch.ones(partition.local_shape[:2], dtype=torch.float64)
    for centre, half_width in zip(centres, half_widths, strict=True):
        rows, columns = (
            torch.from_numpy(_profile(partition.shape[axis], centre[axis], half_width[axis])[slice(*owned)])
            for axis, owned in enumerate(partition.owned)
        )
        outside *= 1 - rows[:, None] * columns
    inside = 1 - outside
    return torch.stack([1 - (1 - _INSIDE[0]) * inside, _INSIDE[1] * inside], dim=-1)


def _profile(points: int, centre: float, half_width: float) -> npt.NDArray[np.float64]:
    """Return a smooth periodic hat of height 1 along one axis of the whole grid.

    The whole axis is computed, because vectorised functions may round the same argument differently at different array
    positions.
    """
    chord = np.sin(math.pi * (np.arange(points) / points - centre)) / math.pi
    hat: npt.NDArray[np.float64] = np.exp(-((chord / half_width) ** 4))
    return hat
