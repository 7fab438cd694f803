"""Model of the graph diffusion problem: a learnt heat flux along the edges."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from pnode_dist.nn.perceptron import Perceptron
from pnode_dist.problems.graph_diffusion.config import GraphDiffusionModelConfig

_FEATURES = 3
_FIRST_OUTPUT = 0.1


class LearntFlux(nn.Module):
    """The flux c(m, d^2, l) (w_j - w_i) into node i along each of its edges, with c positive.

    m is the mean of both ends, d their difference and l the edge's length in units of `length`. c is `conductance`
    times the softplus of a perceptron of m, d^2 and l, scaled so that it starts near 1. As c is symmetric in the ends
    of an edge, heat is conserved. As it is positive, heat flows from hot to cold.
    """

    def __init__(self, config: GraphDiffusionModelConfig, conductance: float, length: float, seed: int) -> None:
        super().__init__()
        self.conductance, self.length = conductance / math.log(2), length
        widths = (_FEATURES, *config.hidden, 1)
        self.network = Perceptron(widths, config.activation, seed=seed, first_output=_FIRST_OUTPUT)

    def conductances(self, target: torch.Tensor, source: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return c `[..., edges, 1]` from both ends of each edge and its length."""
        relative = (lengths / self.length).expand(target.shape)
        features = torch.cat([(target + source) / 2, (target - source).square(), relative], dim=-1)
        return self.conductance * functional.softplus(self.network(features))

    def forward(self, target: torch.Tensor, source: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the flux `[..., edges, 1]` from both ends of each edge and its length."""
        return self.conductances(target, source, lengths) * (source - target)
