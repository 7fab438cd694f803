"""Continuous normalizing flows: samples and their log density, carried along by a learnt velocity.

W. Grathwohl et al.: FFJORD: free-form continuous dynamics for scalable reversible generative models, ICLR 2019 (here
"FFJORD"). C. Finlay et al.: How to train your neural ODE: the world of Jacobian and kinetic regularization, ICML 2020
("RNODE").

`FlowDynamics` is a right-hand side and knows nothing of solvers; `ContinuousFlow` is made of solves of such, which are
called as `pnode_dist.NeuralODE` is, and knows nothing of how they are done. Nothing here communicates by itself: a rank
holds whole samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from pnode_dist.nn.concat_squash import ConcatSquashPerceptron
from pnode_dist.problems.flows_config import FlowsModelConfig

Parts = tuple[torch.Tensor, ...]

KINETIC, JACOBIAN = "kinetic", "jacobian"
_FIRST_OUTPUT = 0.5


class Velocity(Protocol):
    """A module that gives a velocity field and its derivatives, see `ConcatSquashPerceptron.with_tangents`."""

    def with_tangents(
        self, t: torch.Tensor, x: torch.Tensor, tangents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class FlowDynamics(nn.Module):
    """d/dt (z, log p, ...) of samples z `[sample, dimension]` with log densities `[sample]` in a velocity v(t, z).

    dz/dt = v and d log p/dt = -tr(dv/dz) (R. T. Q. Chen et al.: Neural ordinary differential equations, NeurIPS 2018,
    theorem 1). `charges` names further parts of the state, `[sample]` each, that add up over time: `kinetic` |v|^2,
    `jacobian` the squared Frobenius norm of dv/dz (RNODE).

    With noise e `[sample, dimension]`, of zero mean and unit covariance and the same during a solve, e.(dv/dz) e and
    |(dv/dz) e|^2 stand for trace and norm, whose expectations they are (M. F. Hutchinson 1990; FFJORD, section 3.1).
    Without noise both are exact, at the cost of a derivative for each dimension. Neither needs gradients to be on.
    """

    basis: torch.Tensor

    def __init__(self, velocity: Velocity, dimension: int, charges: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.velocity = velocity
        self.charges = charges
        self.register_buffer("basis", torch.eye(dimension, dtype=torch.float64).unsqueeze(1), persistent=False)

    def start(self, samples: torch.Tensor, log_density: torch.Tensor | None = None) -> Parts:
        """The state of `samples` at the start of a solve, with a log density of zero unless it is given."""
        zero = samples.new_zeros(len(samples))
        return (samples, zero if log_density is None else log_density, *(zero for _ in self.charges))

    def forward(self, t: torch.Tensor, state: Parts, noise: torch.Tensor | None = None) -> Parts:
        """The rates of change, part by part. Not collective."""
        directions = self.basis if noise is None else noise.unsqueeze(0)
        velocity, derivatives = self.velocity.with_tangents(t, state[0], directions)
        if noise is None:
            trace = derivatives.diagonal(dim1=0, dim2=2).sum(dim=-1)
        else:
            trace = (noise * derivatives[0]).sum(dim=-1)
        rates = [velocity, -trace]
        for charge in self.charges:
            rates.append(velocity.square().sum(dim=-1) if charge == KINETIC else derivatives.square().sum(dim=(0, 2)))
        return tuple(rates)


class FlowDensity(NamedTuple):
    """What a flow says of samples: where they end in the base space `[sample, dimension]`, the log of their density
    `[sample]` in nats, and the integrals of the charges `[sample]` each."""

    base: torch.Tensor
    log_density: torch.Tensor
    charges: Parts


class ContinuousFlow(nn.Module):
    """Flows one after another from data at time 0 to standard normal noise at `time`, and back.

    `solves` are modules that are called as `solve(state, times, *args)`, with a tuple of parts and two times, and
    return each part at both times, like a `NeuralODE`; `dynamics` are the right-hand sides that they solve, in the same
    order, called as `dynamics(t, state, *args)`. Collective as the solves are.
    """

    def __init__(self, dynamics: Sequence[FlowDynamics], solves: Sequence[nn.Module], time: float) -> None:
        super().__init__()
        self.solves = nn.ModuleList(solves)
        # Their parameters are those of the solves.
        self._dynamics = tuple(dynamics)
        self.time = time

    def start(self, samples: torch.Tensor, log_density: torch.Tensor | None = None) -> Parts:
        """The state of the first solve, see `FlowDynamics.start`."""
        return self._dynamics[0].start(samples, log_density)

    def forward(self, samples: torch.Tensor, noise: torch.Tensor | None = None) -> FlowDensity:
        """Where `samples` `[sample, dimension]` come from, and how likely they are; with `noise` by Hutchinson's
        estimate."""
        state = self.start(samples)
        for solve in self.solves:
            state = _solved(solve, state, (0.0, self.time), () if noise is None else (noise,))
        base, change, *charges = state
        return FlowDensity(base, standard_normal(base) - change, tuple(charges))

    def sample(self, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples that the flow makes of noise `base` `[sample, dimension]`, and their log densities `[sample]`."""
        state = self.start(base, standard_normal(base))
        for solve in reversed(self.solves):
            state = _solved(solve, state, (self.time, 0.0), ())
        return state[0], state[1]


def continuous_flow(
    config: FlowsModelConfig,
    dimension: int,
    seed: int,
    dtype: torch.dtype,
    solve: Callable[[FlowDynamics], nn.Module],
) -> ContinuousFlow:
    """The configured flow of samples with `dimension` entries, computing in `dtype`, its parameters fixed by `seed`.

    `solve` makes of each right-hand side the module that solves it, see `ContinuousFlow`. Not collective.
    """
    charges = tuple(name for name in (KINETIC, JACOBIAN) if getattr(config, name) > 0)
    widths = (dimension, *config.hidden, dimension)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dynamics = [
            FlowDynamics(ConcatSquashPerceptron(widths, config.activation, _FIRST_OUTPUT), dimension, charges).to(dtype)
            for _ in range(config.flows)
        ]
    return ContinuousFlow(dynamics, [solve(one) for one in dynamics], config.time)


def standard_normal(z: torch.Tensor) -> torch.Tensor:
    """The log of the standard normal density `[sample]` at `z` `[sample, dimension]`."""
    return -0.5 * (z.square().sum(dim=-1) + z.shape[-1] * math.log(2 * math.pi))


def _solved(solve: nn.Module, state: Parts, times: tuple[float, float], args: tuple[Any, ...]) -> Parts:
    return tuple(part[-1] for part in solve(state, times, *args))
