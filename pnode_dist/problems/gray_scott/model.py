"""Model of the Gray-Scott problem: a learnt tendency without built-in knowledge of diffusion and reaction."""

from __future__ import annotations

import torch
from torch import nn

from pnode_dist.nn import Conv2d
from pnode_dist.nn.activation import ACTIVATIONS
from pnode_dist.partition.grid import GridPartition

_KERNEL = 3
_FIRST_OUTPUT = 0.1


class ConvolutionalTendency(nn.Module):
    """The right-hand side dw/dt = r N(w), with N a residual stack of 3 x 3 convolutions.

    The state w is `[..., ny_local, nx_local, species]`. `rate` r `[species]` scales the output; None means 1. The
    output layer starts at a tenth of torch's initialisation, so that the first solves stay near their initial states.
    Parameters are float64 until converted by `to`. Collective on the partition's communicator.
    """

    rate: torch.Tensor

    def __init__(
        self,
        partition: GridPartition,
        channels: int,
        layers: int,
        activation: str = "silu",
        rate: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        species = partition.channels
        self.activation = ACTIVATIONS[activation]
        self.hidden = nn.ModuleList(
            Conv2d(partition, before, channels, _KERNEL, dtype=torch.float64)
            for before in [species, *[channels] * (layers - 2)]
        )
        self.output = Conv2d(partition, channels, species, _KERNEL, dtype=torch.float64)
        scale = torch.ones(species, dtype=torch.float64) if rate is None else rate
        self.register_buffer("rate", scale, persistent=False)
        with torch.no_grad():
            for value in self.output.parameters():
                value.mul_(_FIRST_OUTPUT)

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return dw/dt in the state's shape; `t` is unused. Collective on the partition's communicator."""
        x = state
        for number, layer in enumerate(self.hidden):
            y = self.activation(layer(x))
            x = y if number == 0 else x + y
        tendency: torch.Tensor = self.rate * self.output(x)
        return tendency


def right_hand_side(
    partition: GridPartition,
    channels: int = 16,
    layers: int = 3,
    dtype: torch.dtype = torch.float32,
    activation: str = "silu",
    rate: torch.Tensor | None = None,
    seed: int = 0,
) -> ConvolutionalTendency:
    """Build the right-hand side, which computes in `dtype`, with initial parameters determined by `seed`.

    The parameters are drawn in float64 and then rounded to `dtype`, so that every rank and every dtype starts from the
    same values. Not collective.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tendency = ConvolutionalTendency(partition, channels, layers, activation, rate)
    return tendency.to(dtype)
