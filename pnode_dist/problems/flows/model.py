"""Continuous normalizing flows: samples and their log density, transported by a learnt velocity.

W. Grathwohl et al.: FFJORD: free-form continuous dynamics for scalable reversible generative models, ICLR 2019 (here
"FFJORD"). C. Finlay et al.: How to train your neural ODE: the world of Jacobian and kinetic regularization, ICML 2020
("RNODE").

`FlowDynamics` is a right-hand side and independent of solvers. `ContinuousFlow` consists of solves of such right-hand
sides, with the call signature of `pnode_dist.NeuralODE` and any method. This module does not communicate by itself: a
rank holds whole samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import nn

from pnode_dist.nn.concat_squash import ConcatSquashPerceptron
from pnode_dist.problems.flows.config import FlowsModelConfig

if TYPE_CHECKING:
    from pnode_dist.ode.odeint import NeuralODE
    from pnode_dist.partition.protocol import Partition

Parts = tuple[torch.Tensor, ...]

KINETIC, JACOBIAN = "kinetic", "jacobian"
_FIRST_OUTPUT = 0.5


class Velocity(Protocol):
    """Interface of a velocity field with derivatives, see `ConcatSquashPerceptron.with_tangents`."""

    def with_tangents(
        self, t: torch.Tensor, x: torch.Tensor, tangents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class FlowDynamics(nn.Module):
    """d/dt (z, log p, ...) of samples z `[sample, dimension]` with log densities `[sample]` in a velocity v(t, z).

    dz/dt = v and d log p/dt = -tr(dv/dz) (R. T. Q. Chen et al.: Neural ordinary differential equations, NeurIPS 2018,
    theorem 1). `charges` names further parts of the state, `[sample]` each, that are integrals over time: `kinetic` of
    |v|^2, `jacobian` of the squared Frobenius norm of dv/dz (RNODE). They are parts of the state because they share the
    derivatives of v: as a running cost, `integrate`, they would need a second evaluation.

    With noise e `[sample, dimension]`, of zero mean and unit covariance and the same during a solve, e.(dv/dz) e and
    |(dv/dz) e|^2 are unbiased estimates of trace and norm (M. F. Hutchinson 1990; FFJORD, section 3.1). Without noise
    both are exact, at the cost of one derivative per dimension. Neither requires gradients to be enabled.
    """

    basis: torch.Tensor

    def __init__(self, velocity: Velocity, dimension: int, charges: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.velocity = velocity
        self.charges = charges
        self.register_buffer("basis", torch.eye(dimension, dtype=torch.float64).unsqueeze(1), persistent=False)

    def start(self, samples: torch.Tensor, log_density: torch.Tensor | None = None) -> Parts:
        """Return the initial state of `samples` for a solve, with a log density of zero unless it is given."""
        zero = samples.new_zeros(len(samples))
        return (samples, zero if log_density is None else log_density, *(zero for _ in self.charges))

    def forward(self, t: torch.Tensor, state: Parts, noise: torch.Tensor | None = None) -> Parts:
        """Return the rates of change, part by part. Not collective."""
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


class Whitening(nn.Module):
    """Linear map from rows x = m + L y to y, with the `mean` m `[dimension]` and the lower triangular `factor` L."""

    mean: torch.Tensor
    factor: torch.Tensor

    def __init__(self, mean: torch.Tensor, factor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the whitened rows `[row, dimension]`."""
        white: torch.Tensor = torch.linalg.solve_triangular(self.factor, (rows - self.mean).T, upper=False).T
        return white

    def back(self, white: torch.Tensor) -> torch.Tensor:
        """Return the rows `[..., dimension]` of whitened rows."""
        return self.mean + white @ self.factor.T

    def log_volume(self) -> torch.Tensor:
        """Return log det L, the log density of whitened rows less that of the rows."""
        return self.factor.diagonal().log().sum()


class FlowDensity(NamedTuple):
    """Densities of samples by a flow.

    `base` `[sample, dimension]` are the samples' positions in the base space, `log_density` `[sample]` is in nats, and
    `charges` are the integrals of the charges, `[sample]` each.
    """

    base: torch.Tensor
    log_density: torch.Tensor
    charges: Parts


class ContinuousFlow(nn.Module):
    """Consecutive flows from data at time 0 to standard normal noise at `time`, and back.

    `solves` are modules called as `solve(state, times, *args)`, with a tuple of parts and two times. Each returns the
    parts at the second time, like a `NeuralODE` with `last_only`. `dynamics` are their right-hand sides in the same
    order, called as `dynamics(t, state, *args)`. With `whitening`, the first flow starts from whitened samples.
    Collective as the solves are.
    """

    def __init__(
        self,
        dynamics: Sequence[FlowDynamics],
        solves: Sequence[nn.Module],
        time: float,
        whitening: Whitening | None = None,
    ) -> None:
        super().__init__()
        self.solves = nn.ModuleList(solves)
        # A tuple keeps them unregistered: their parameters belong to the solves.
        self._dynamics = tuple(dynamics)
        self.time = time
        self.whitening = whitening

    def distribute_over(self, partition: Partition) -> None:
        """Set the distribution of samples over ranks for the next calls.

        All ranks pass the same distribution, and the same object each time.
        """
        for solve in self.solves:
            cast("NeuralODE", solve).partition = partition

    @property
    def charges(self) -> tuple[str, ...]:
        """Names of the charges of the flow."""
        return self._dynamics[0].charges

    def start(self, samples: torch.Tensor) -> Parts:
        """Return the initial state of the first solve: `samples`, and the change of log density due to whitening."""
        if self.whitening is None:
            return self._dynamics[0].start(samples)
        volume = self.whitening.log_volume().expand(len(samples))
        return self._dynamics[0].start(self.whitening(samples), volume)

    def forward(self, samples: torch.Tensor, noise: torch.Tensor | None = None) -> FlowDensity:
        """Map `samples` `[sample, dimension]` to the base space, and return their densities.

        With `noise`, uses Hutchinson's estimate.
        """
        state = self.start(samples)
        for solve in self.solves:
            state = solve(state, (0.0, self.time), *(() if noise is None else (noise,)))
        base, change, *charges = state
        return FlowDensity(base, standard_normal(base) - change, tuple(charges))

    def sample(self, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map noise `base` `[sample, dimension]` to samples, and return these and their log densities `[sample]`."""
        state = self._dynamics[-1].start(base, standard_normal(base))
        for solve in reversed(self.solves):
            state = solve(state, (self.time, 0.0))
        if self.whitening is None:
            return state[0], state[1]
        return self.whitening.back(state[0]), state[1] - self.whitening.log_volume()

    def paths(self, base: torch.Tensor, pieces: int) -> torch.Tensor:
        """Return the paths `[time, sample, dimension]` from noise to samples, with `pieces` further times per flow."""
        state, passed = self._dynamics[-1].start(base), [base.unsqueeze(0)]
        times = [self.time * (1 - number / pieces) for number in range(pieces + 1)]
        for solve in reversed(self.solves):
            for interval in pairwise(times):
                state = solve(state, interval)
                passed.append(state[0].unsqueeze(0))
        way = torch.cat(passed)
        return way if self.whitening is None else self.whitening.back(way)


def continuous_flow(
    config: FlowsModelConfig,
    dimension: int,
    seed: int,
    dtype: torch.dtype,
    solve: Callable[[FlowDynamics], nn.Module],
    whitening: Whitening | None = None,
) -> ContinuousFlow:
    """Build the configured flow of samples with `dimension` entries in `dtype`. `seed` determines its parameters.

    `solve` makes the solving module of each right-hand side. See `ContinuousFlow` for `solve` and `whitening`. Not
    collective.
    """
    charges = tuple(name for name in (KINETIC, JACOBIAN) if getattr(config, name) > 0)
    widths = (dimension, *config.hidden, dimension)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dynamics = [
            FlowDynamics(ConcatSquashPerceptron(widths, config.activation, _FIRST_OUTPUT), dimension, charges).to(dtype)
            for _ in range(config.flows)
        ]
    whitening = None if whitening is None else whitening.to(dtype)
    return ContinuousFlow(dynamics, [solve(one) for one in dynamics], config.time, whitening)


def standard_normal(z: torch.Tensor) -> torch.Tensor:
    """Return the log of the standard normal density `[sample]` at `z` `[sample, dimension]`."""
    return -0.5 * (z.square().sum(dim=-1) + z.shape[-1] * math.log(2 * math.pi))
