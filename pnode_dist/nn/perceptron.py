"""A perceptron over the last axis of a state, for small systems with whole samples on each rank."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from pnode_dist.nn.activation import ACTIVATIONS


class Perceptron(nn.Module):
    """Fully connected layers `[..., widths[0]] -> [..., widths[-1]]` with an activation between them. Not collective.

    `widths` are the sizes of the input, of the hidden layers and of the output. The parameters are those that torch's
    initialisation of `torch.nn.Linear` draws under `seed`, in float64: the same for every dtype that `to` makes of
    them. The weights and bias of the last layer are multiplied by `first_output`, so that an untrained network can
    start small.
    """

    def __init__(
        self, widths: tuple[int, ...], activation: str, bias: bool = True, seed: int = 0, first_output: float = 1.0
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(
                nn.Linear(before, after, bias=bias, dtype=torch.float64) for before, after in pairwise(widths)
            )
        with torch.no_grad():
            for value in self.layers[-1].parameters():
                value.mul_(first_output)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for each sample."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        y: torch.Tensor = self.layers[-1](x)
        return y
