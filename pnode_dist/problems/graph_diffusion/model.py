"""The model of the graph diffusion problem: heat that flows along the edges as a network says, and its solve."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from pnode_dist.nn.perceptron import Perceptron
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.problems.common.trajectories import Windows
from pnode_dist.problems.graph_diffusion.config import GraphDiffusionModelConfig
from pnode_dist.problems.graph_diffusion.data import MeshData
from pnode_dist.problems.graph_diffusion.physics import Diffusion

_FEATURES = 3
_FIRST_OUTPUT = 0.1


class LearntFlux(nn.Module):
    """c(m, d^2, l) (w_j - w_i), what flows into node i along each of its edges, c positive.

    m is the mean of both ends, d their difference and l the edge's length, in units of `length`; c is `conductance`
    times the softplus of a perceptron of these, which starts near 1. As c is the same from both ends, no heat is lost;
    as it is positive, heat flows from hot to cold.
    """

    def __init__(self, config: GraphDiffusionModelConfig, conductance: float, length: float, seed: int) -> None:
        super().__init__()
        self.conductance, self.length = conductance / math.log(2), length
        widths = (_FEATURES, *config.hidden, 1)
        self.network = Perceptron(widths, config.activation, seed=seed, first_output=_FIRST_OUTPUT)

    def conductances(self, target: torch.Tensor, source: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """c `[..., edges, 1]` for both ends of each edge and its length."""
        relative = (lengths / self.length).expand(target.shape)
        features = torch.cat([(target + source) / 2, (target - source).square(), relative], dim=-1)
        return self.conductance * functional.softplus(self.network(features))

    def forward(self, target: torch.Tensor, source: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """`[..., edges, 1]` for both ends of each edge and its length."""
        return self.conductances(target, source, lengths) * (source - target)


def right_hand_side(config: GraphDiffusionModelConfig, data: MeshData, seed: int, dtype: torch.dtype) -> Diffusion:
    """The learnt diffusion, computing in `dtype`, with the parameters that `seed` fixes. Not collective.

    Its conductances start near those of the constant conductivity that fits the data best.
    """
    length = float(data.mesh.lengths.mean())
    flux = LearntFlux(config, data.conductivity / length**2, length, seed)
    return Diffusion(data.partition, flux, data.lengths).to(dtype)


class GraphDiffusionModel(nn.Module):
    """Rollouts of windows: `model(windows)` is `[lead, window, local_nodes, 1]`, in units of the data's scale.

    `solve` is the NeuralODE over the windows. Collective on the partition's communicator.
    """

    def __init__(self, solve: NeuralODE) -> None:
        super().__init__()
        self.solve = solve

    def forward(self, batch: Windows) -> torch.Tensor:
        """The states at the leads 1, 2, ... of the windows' targets."""
        states: torch.Tensor = self.solve(batch.initial, batch.times)
        return states[1:]
