"""A small inverse problem: the initial state of a heat equation with a source on a periodic line."""

from __future__ import annotations

import math

import torch
from torch import nn

from pnode_dist import GridPartition, Mesh, NeuralODE
from pnode_dist.exchange import halo
from pnode_dist.inverse import Control, Gaussian, GridCovariance, Inverse, Observation, Subsample
from tests.oracles.right_hand_sides import random

DIFFUSION, OBSERVED = 0.002, 6


def heat_line(mesh: Mesh, points: int = 12, of_functions: bool = False) -> Inverse:
    """The problem on so many points, observed at fixed places. `of_functions`: the inner product is the prior's."""
    partition = GridPartition(mesh, (points,), 1, "periodic")
    spacing = 1 / points

    class Heat(nn.Module):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            wide = halo(u, partition, 1)
            return DIFFUSION * (wide[2:] - 2 * u + wide[:-2]) / spacing**2 + torch.sin(u)

    node = NeuralODE(Heat(), method="rk4", step_size=0.5 * spacing**2 / DIFFUSION, partition=partition)
    observe = Subsample(partition, (points // OBSERVED, 1))
    data = observe.part_of(random(2, OBSERVED, 1, seed=2))
    x = torch.arange(*partition.owned[0], dtype=torch.float64)[:, None] * spacing
    prior = Gaussian(0.0, GridCovariance(partition, 1.0, 0.2, spacing))
    control = Control(torch.sin(2 * math.pi * x), prior=prior, inner_product="prior" if of_functions else None)
    return Inverse(node, [control], [Observation([0.2, 0.4], observe, data, 0.1)])
