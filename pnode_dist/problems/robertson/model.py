"""The model of the Robertson problem: learnt rates of the scaled concentrations, solved in the logarithm of time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from pnode_dist.nn.perceptron import Perceptron
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.problems.common.forecast_data import Windows
from pnode_dist.problems.common.forecast_model import ForecastModel, Group
from pnode_dist.problems.robertson.config import RobertsonModelConfig

_FIRST_OUTPUT = 0.1
_FAST = 100.0


class LogTimeRate(nn.Module):
    """dw/ds = t ln 10 r (N(w) - f w) with t = t0 10^s: dw/dt = r (N(w) - f w) in physical time, by decades s since t0.

    The law itself does not depend on time, but where samples are evenly spaced in log t, steps of one size serve
    windows that begin at any of them. `rate` r `[species]` is how fast a species can change, N the network.

    `fast` f is 1 for species that can change in much less than the longest time between samples, of which N says what
    they tend to, and 0 for the others. Without that relaxation an untrained network would be as likely to have growing
    solutions as decaying ones, at the fastest rate in the data, and late steps would have no solution.
    """

    rate: torch.Tensor
    fast: torch.Tensor

    def __init__(self, network: Perceptron, rate: torch.Tensor, fast: torch.Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("rate", rate, persistent=False)
        self.register_buffer("fast", fast.to(rate.dtype), persistent=False)

    def forward(self, s: torch.Tensor, state: torch.Tensor, begin: torch.Tensor) -> torch.Tensor:
        """dw/ds in the shape of `state` `[start, trajectory_local, species]`; `begin` `[start, 1, 1]` is t0."""
        time = begin * torch.pow(10.0, s)
        slope: torch.Tensor = math.log(10.0) * time * self.rate * (self.network(state) - self.fast * state)
        return slope


def right_hand_side(config: RobertsonModelConfig, rate: torch.Tensor, times: Sequence[float], seed: int) -> LogTimeRate:
    """The model's right-hand side, with the parameters that `seed` fixes. Not collective.

    `rate` `[species]` are the fastest changes of the training trajectories, `times` those of their samples.
    """
    species = len(rate)
    network = Perceptron((species, *config.hidden, species), config.activation, config.bias, seed, _FIRST_OUTPUT)
    return LogTimeRate(network, rate, rate * (times[-1] - times[-2]) > _FAST)


class RobertsonModel(ForecastModel):
    """Rollouts of windows in the logarithm of time, of samples that are `decades` apart."""

    def __init__(self, solve: NeuralODE, decades: float) -> None:
        super().__init__(solve)
        self.decades = decades

    def groups(self, batch: Windows) -> Iterator[Group]:
        """All windows at once, solved for the decades since their starts; f is given the times of their starts."""
        begin = torch.tensor([times[0] for times in batch.times], dtype=batch.initial.dtype)
        clock = tuple(number * self.decades for number in range(len(batch.targets) + 1))
        yield Group(tuple(range(len(batch.starts))), clock, (begin[:, None, None],))
