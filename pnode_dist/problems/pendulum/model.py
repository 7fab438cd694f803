"""Model of the pendulum problem: a learnt force on a point held by a rod, as a differential-algebraic equation.

The constraint of constant rod length, differentiated twice, is an algebraic equation that determines the tension at
each time. The system therefore has index 1 (E. Hairer, G. Wanner: Solving Ordinary Differential Equations II, section
VII.1). The constraint itself holds only up to the error of the steps, so its drift is reported.
"""

from __future__ import annotations

import torch
from torch import nn

from pnode_dist.nn.perceptron import Perceptron
from pnode_dist.ode.consistent import consistent
from pnode_dist.problems.common.forecast_data import Windows
from pnode_dist.problems.common.forecast_model import ForecastModel
from pnode_dist.problems.pendulum.config import PendulumModelConfig, PendulumParameters
from pnode_dist.problems.pendulum.data import Motions

_DIFFERENTIAL = 4


def mass_matrix() -> torch.Tensor:
    """Return M `[5, 5]` of M du/dt = f for the state u = (x, y, vx, vy, tension).

    The row of the tension is zero: its equation is algebraic.
    """
    return torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64))


class LearntForce(nn.Module):
    """The learnt force at a position q and a velocity v: a perceptron of (q, v) with scaled input and output.

    `data` holds the means and standard deviations of the training trajectories for both scalings.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    force_mean: torch.Tensor
    force_deviation: torch.Tensor

    def __init__(self, network: Perceptron, data: Motions) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", data.mean[:_DIFFERENTIAL], persistent=False)
        self.register_buffer("deviation", data.deviation[:_DIFFERENTIAL], persistent=False)
        self.register_buffer("force_mean", data.force_mean, persistent=False)
        self.register_buffer("force_deviation", data.force_deviation, persistent=False)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """The force `[..., 2]` at states `[..., 5]`."""
        normalised = self.network((state[..., :_DIFFERENTIAL] - self.mean) / self.deviation)
        force: torch.Tensor = self.force_mean + self.force_deviation * normalised
        return force


class TrueForce(nn.Module):
    """The gravity and drag of the computed trajectories, for comparison. See `PendulumParameters`."""

    def __init__(self, parameters: PendulumParameters) -> None:
        super().__init__()
        self.parameters_of_motion = parameters

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """The force `[..., 2]` at states `[..., 5]`."""
        chosen = self.parameters_of_motion
        linear, quadratic = chosen.drag
        relative = state[..., 2:4] - state.new_tensor([chosen.wind, 0.0])
        speed = relative.norm(dim=-1, keepdim=True)
        force: torch.Tensor = state.new_tensor([0.0, -chosen.gravity]) - (linear + quadratic * speed) * relative
        return force


class ConstrainedMotion(nn.Module):
    """The right-hand side f of M du/dt = f: q' = v, v' = F - T q, 0 = |v|^2 + q (F - T q).

    The last equation is the second time derivative of |q|^2 / 2. `force` returns F at a state; T is the tension.
    """

    def __init__(self, force: nn.Module) -> None:
        super().__init__()
        self.force = force

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return M du/dt in the shape of `state` `[..., 5]`; `t` is unused."""
        position, velocity, tension = state[..., 0:2], state[..., 2:4], state[..., 4:]
        acceleration = self.force(state) - tension * position
        radial = velocity.square().sum(dim=-1, keepdim=True) + (position * acceleration).sum(dim=-1, keepdim=True)
        return torch.cat([velocity, acceleration, radial], dim=-1)


def right_hand_side(config: PendulumModelConfig, data: Motions, seed: int) -> ConstrainedMotion:
    """Build the model's right-hand side, with initial parameters determined by `seed`. Not collective."""
    network = Perceptron((_DIFFERENTIAL, *config.hidden, 2), config.activation, True, seed)
    return ConstrainedMotion(LearntForce(network, data))


class PendulumModel(ForecastModel):
    """Rollouts of windows from initial states whose tensions are consistent with the learnt force."""

    def initial(self, batch: Windows) -> torch.Tensor:
        """Return the initial states of the windows, with tensions consistent with the learnt force."""
        found: torch.Tensor = consistent(
            self.solve.func,
            batch.initial,
            0.0,
            self.solve.mass,
            partition=batch.samples.partition,
            preconditioner=self.solve.preconditioner,
        )
        return found
