"""Configuration of the pendulum problem: the forces, the trajectories that are computed, and the model.

Nothing here imports torch or PETSc, so that a configuration is validated at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from pnode_dist.config.definition import ModelTable
from pnode_dist.config.tables import Count, ForecastRun, NotNegative, Positive
from pnode_dist.problems.common.tables import ComputedTable

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True)
class PendulumParameters:
    """A point of unit mass on a massless rod of `length` m in a vertical plane, x to the right and y upwards.

    On it act gravity, `gravity` m/s^2 downwards, and the drag of air that moves to the right with `wind` m/s:
    -(c1 + c2 |r|) r for the velocity r relative to the air, `drag` = (c1 in 1/s, c2 in 1/m).
    """

    length: float = 1.0
    gravity: float = 9.81
    drag: tuple[float, float] = (0.1, 0.15)
    wind: float = 2.0


class PendulumConfig(ComputedTable):
    """The table `[problem]` with `type = "pendulum"`: trajectories computed from the forces, to learn the forces from.

    See `PendulumParameters`. A sample is the state at one time, and samples of a trajectory are `interval` seconds
    apart, the first at time 0.
    """

    type: Literal["pendulum"]
    """The name of the problem."""
    length: Positive = PendulumParameters.length
    """Length of the rod, in m."""
    gravity: NotNegative = PendulumParameters.gravity
    """Gravitational acceleration, downwards, in m/s^2."""
    drag: tuple[NotNegative, NotNegative] = PendulumParameters.drag
    """Coefficients (c1, c2) of the drag -(c1 + c2 |r|) r for the velocity r relative to the air, in 1/s and 1/m."""
    wind: Number = PendulumParameters.wind
    """Velocity of the air to the right, in m/s."""
    largest_angle: Annotated[float, Field(gt=0, le=3.141592653589793, strict=True)] = 2.5
    """Largest initial angle from the downward position to either side, in radians. Angles are drawn uniformly."""
    largest_speed: NotNegative = 2.0
    """Largest initial speed in either direction, in m/s. Speeds are drawn uniformly."""
    interval: Positive
    """Time between samples, in s."""

    @property
    def parameters(self) -> PendulumParameters:
        """The forces' own."""
        return PendulumParameters(self.length, self.gravity, self.drag, self.wind)


class PendulumModelConfig(ModelTable):
    """The table `[model]` of a pendulum problem: the perceptron in place of the forces."""

    hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (24, 24)
    """Units of each hidden layer."""
    activation: Literal["gelu", "silu", "tanh"] = "tanh"
    """The activation function between layers."""


class PendulumRun(ForecastRun):
    """A whole configuration of a pendulum problem."""

    problem: PendulumConfig
    model: PendulumModelConfig = PendulumModelConfig()
