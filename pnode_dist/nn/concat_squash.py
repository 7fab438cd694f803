"""A perceptron gated and shifted by time, with its derivatives along directions: the velocity of a continuous flow.

Derivatives are computed layer by layer beside the values, from ordinary operations alone. Unlike torch's forward mode
they work without gradients, and can be differentiated again, also by an adjoint.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import nn
from torch.nn import functional

ValueAndSlope = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class ConcatSquash(nn.Module):
    """The layer (W x + b) sigmoid(w t + c) + v t at time t, `[..., before] -> [..., after]`. Not collective.

    W. Grathwohl et al.: FFJORD: free-form continuous dynamics for scalable reversible generative models, ICLR 2019,
    whose code calls this layer "concatsquash".
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.linear = nn.Linear(before, after, dtype=torch.float64)
        # Initialised like linear maps of one number.
        self.gate, self.gate_bias, self.shift = (
            nn.Parameter(torch.empty(after, dtype=torch.float64).uniform_(-1, 1)) for _ in range(3)
        )

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the output for each sample. `t` is 0-dimensional."""
        return torch.addcmul(self.shift * t, self.linear(x), self._gate(t))

    def with_tangents(
        self, t: torch.Tensor, x: torch.Tensor, tangents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output, and its derivatives `[..., after]` along `tangents` `[..., before]`."""
        gate = self._gate(t)
        y = torch.addcmul(self.shift * t, self.linear(x), gate)
        return y, functional.linear(tangents, self.linear.weight) * gate

    def _gate(self, t: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.addcmul(self.gate_bias, self.gate, t))


class ConcatSquashPerceptron(nn.Module):
    """Layers `ConcatSquash` of the given widths with a smooth activation between them. Not collective.

    The parameters are those that torch's initialisation of `torch.nn.Linear` draws from its global generator, in
    float64. Those of the last layer's linear map are multiplied by `first_output`, so that an untrained network can
    start small.
    """

    def __init__(self, widths: tuple[int, ...], activation: str, first_output: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConcatSquash(before, after) for before, after in pairwise(widths))
        self.value_and_slope = SMOOTH_ACTIVATIONS[activation]
        with torch.no_grad():
            for value in self.layers[-1].parameters():
                value.mul_(first_output)

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the output for each sample. `t` is 0-dimensional."""
        for layer in self.layers[:-1]:
            x, _ = self.value_and_slope(layer(t, x))
        y: torch.Tensor = self.layers[-1](t, x)
        return y

    def with_tangents(
        self, t: torch.Tensor, x: torch.Tensor, tangents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output `[sample, out]` at `x` `[sample, in]`, and its derivatives `[direction, sample, out]`.

        They are those along `tangents` `[direction, sample, in]`, or `[direction, 1, in]` for all samples.
        """
        *hidden, last = cast("list[ConcatSquash]", list(self.layers))
        for layer in hidden:
            x, tangents = layer.with_tangents(t, x, tangents)
            x, slope = self.value_and_slope(x)
            tangents = slope * tangents
        y, tangents = last.with_tangents(t, x, tangents)
        return y, tangents.expand(-1, *y.shape)


def _tanh(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value = torch.tanh(x)
    return value, 1 - value.square()


def _softplus(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return functional.softplus(x), torch.sigmoid(x)


def _silu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate = torch.sigmoid(x)
    value = x * gate
    return value, gate + value * (1 - gate)


SMOOTH_ACTIVATIONS: dict[str, ValueAndSlope] = {"silu": _silu, "softplus": _softplus, "tanh": _tanh}
"""Activations with a continuous derivative: a function that returns value and slope, by name."""
