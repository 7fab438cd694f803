"""The model of the Robertson problem: learnt rates of the scaled concentrations, solved in the logarithm of time."""

from __future__ import annotations

import math

import torch
from torch import nn

from pnode_dist.nn.perceptron import Perceptron
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.problems.common.ensemble import Windows
from pnode_dist.problems.robertson.data import RobertsonData

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


def right_hand_side(
    hidden: tuple[int, ...], activation: str, bias: bool, data: RobertsonData, seed: int, dtype: torch.dtype
) -> LogTimeRate:
    """The model's right-hand side, computing in `dtype`, with the parameters that `seed` fixes. Not collective."""
    species = len(data.rate)
    network = Perceptron((species, *hidden, species), activation, bias, seed, _FIRST_OUTPUT)
    fast = data.rate * (data.times[-1] - data.times[-2]) > _FAST
    return LogTimeRate(network, data.rate, fast).to(dtype)


class RobertsonModel(nn.Module):
    """Rollouts of windows: `model(windows)` is `[lead, start, trajectory_local, species]`, scaled.

    `solve` is the NeuralODE over the windows; it is set to the partition of each. `times` are those of the samples,
    `decades` their spacing in log10. Collective on the partition's communicator.
    """

    def __init__(self, solve: NeuralODE, times: tuple[float, ...], decades: float) -> None:
        super().__init__()
        self.solve = solve
        self.times = times
        self.decades = decades

    def clock(self, leads: int) -> list[float]:
        """The decades since their start at which windows of `leads` samples are solved for."""
        return [number * self.decades for number in range(leads + 1)]

    def begin(self, batch: Windows) -> torch.Tensor:
        """The times `[start, 1, 1]` at which the windows start."""
        times = torch.tensor([self.times[start] for start in batch.starts], dtype=batch.initial.dtype)
        return times[:, None, None]

    def forward(self, batch: Windows) -> torch.Tensor:
        """The states at the leads 1, 2, ... of the windows' targets."""
        self.solve.partition = batch.partition
        states = self.solve(batch.initial, self.clock(len(batch.targets)), self.begin(batch))
        rollout: torch.Tensor = states[1:]
        return rollout
