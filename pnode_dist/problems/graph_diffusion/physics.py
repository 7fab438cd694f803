"""Nonlinear diffusion of heat on a partitioned mesh, and its initial states."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pnode_dist.nn import MessagePassing
from pnode_dist.partition.graph import GraphPartition
from pnode_dist.problems.graph_diffusion.config import DiffusionParameters
from pnode_dist.problems.graph_diffusion.mesh import IrregularMesh

_SPOTS = (3, 7)
_HEIGHT = (0.4, 1.2)
_WIDTH = (0.06, 0.16)


class Flux(nn.Module):
    """The flux k(m) (u_j - u_i) / l^2 into node i along each of its edges, with m the mean of both ends."""

    def __init__(self, parameters: DiffusionParameters) -> None:
        super().__init__()
        self.constant, self.quadratic = parameters.conductivity

    def conductivity(self, mean: torch.Tensor) -> torch.Tensor:
        """Return k at the mean of the two ends."""
        return self.constant + self.quadratic * mean.square()

    def forward(self, target: torch.Tensor, source: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the flux `[..., edges, 1]` from both ends of each edge and its length."""
        return self.conductivity((target + source) / 2) * (source - target) / lengths.square()


class Diffusion(nn.Module):
    """The sum of the fluxes into each node, as a right-hand side for `NeuralODE`.

    A state is `[..., local_nodes, 1]`; `lengths` are `[local_edges, 1]`. `flux` must be antisymmetric in the ends of an
    edge, so that the sum over all nodes is conserved. Collective on the partition's communicator.
    """

    lengths: torch.Tensor

    def __init__(self, partition: GraphPartition, flux: nn.Module, lengths: torch.Tensor) -> None:
        super().__init__()
        self.flux = MessagePassing(partition, flux)
        self.register_buffer("lengths", lengths, persistent=False)

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return du/dt in the state's shape; `t` is unused. Collective on the partition's communicator."""
        rate: torch.Tensor = self.flux(state, self.lengths)
        return rate


def initial_state(mesh: IrregularMesh, seed: int, number: int = 0) -> torch.Tensor:
    """Return the whole initial state `[nodes, 1]`, float64: random hot spots determined by `seed` and `number`.

    Not collective.
    """
    generator = np.random.default_rng([seed, number])
    count = int(generator.integers(*_SPOTS))
    centres = generator.random((count, 2))
    heights, widths = generator.uniform(*_HEIGHT, count), generator.uniform(*_WIDTH, count)
    squares = ((mesh.points[:, None] - centres) ** 2).sum(axis=-1)
    return torch.from_numpy(np.exp(-squares / (2 * widths**2)) @ heights).unsqueeze(-1)
