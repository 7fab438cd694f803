"""Model of the Robertson problem: learnt rates of the scaled concentrations, solved in the logarithm of time."""

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
    """The right-hand side dw/ds = t ln 10 r (N(w) - f w) in decades s since t0, with t = t0 10^s.

    In physical time it is dw/dt = r (N(w) - f w), which does not depend on time explicitly. As samples are evenly
    spaced in log t, steps of one size in s suit windows that begin at any sample. `rate` r `[species]` is the fastest
    rate of change of a species, and N is the network.

    `fast` f is 1 for species that can change in much less than the longest time between samples, and 0 for the others.
    For fast species N is the value that they relax to. Without this relaxation the solutions of an untrained network
    would be as likely to grow as to decay, at the fastest rate in the data, and late steps would have no solution.
    """

    rate: torch.Tensor
    fast: torch.Tensor

    def __init__(self, network: Perceptron, rate: torch.Tensor, fast: torch.Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("rate", rate, persistent=False)
        self.register_buffer("fast", fast.to(rate.dtype), persistent=False)

    def forward(self, s: torch.Tensor, state: torch.Tensor, begin: torch.Tensor) -> torch.Tensor:
        """Return dw/ds in the shape of `state` `[start, trajectory_local, species]`; `begin` `[start, 1, 1]` is t0."""
        time = begin * torch.pow(10.0, s)
        slope: torch.Tensor = math.log(10.0) * time * self.rate * (self.network(state) - self.fast * state)
        return slope


def right_hand_side(config: RobertsonModelConfig, rate: torch.Tensor, times: Sequence[float], seed: int) -> LogTimeRate:
    """Build the model's right-hand side, with initial parameters determined by `seed`. Not collective.

    `rate` `[species]` are the fastest changes of the training trajectories, and `times` their sample times.
    """
    species = len(rate)
    network = Perceptron((species, *config.hidden, species), config.activation, config.bias, seed, _FIRST_OUTPUT)
    return LogTimeRate(network, rate, rate * (times[-1] - times[-2]) > _FAST)


class RobertsonModel(ForecastModel):
    """Rollouts of windows in the logarithm of time, with samples that are `decades` apart."""

    def __init__(self, solve: NeuralODE, decades: float) -> None:
        super().__init__(solve)
        self.decades = decades

    def groups(self, batch: Windows) -> Iterator[Group]:
        """Yield all windows as one group.

        Its times are decades since the starts of the windows; f receives the start times as an argument.
        """
        begin = torch.tensor([times[0] for times in batch.times], dtype=batch.initial.dtype)
        clock = tuple(number * self.decades for number in range(batch.steps + 1))
        yield Group(tuple(range(len(batch.starts))), clock, (begin[:, None, None],))
