"""Configuration of the pendulum problem: the forces, the trajectories that are computed, and the model.

Nothing here imports torch or PETSc, so that a configuration is validated at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pnode_dist.config.tables import ForecastRun

Count = Annotated[int, Field(ge=1, strict=True)]
Times = Annotated[int, Field(ge=2, strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]


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


class PendulumConfig(BaseModel):
    """The table `[problem]` with `type = "pendulum"`: trajectories computed from the forces, to learn the forces from.

    See `PendulumParameters`. A sample is the state at one time, and samples of a trajectory are `interval` seconds
    apart, the first at time 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["pendulum"]
    length: Positive = PendulumParameters.length
    gravity: NotNegative = PendulumParameters.gravity
    drag: tuple[NotNegative, NotNegative] = PendulumParameters.drag
    wind: Number = PendulumParameters.wind
    largest_angle: Annotated[float, Field(gt=0, le=3.141592653589793, strict=True)] = 2.5
    """Initial angles from the downward rest are drawn uniformly up to this one on either side, in radians."""
    largest_speed: NotNegative = 2.0
    """Initial speeds are drawn uniformly up to this one in either direction, in m/s."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)] = 0
    """Seeds the initial states, and nothing else."""
    trajectories: Count
    """Trajectories to learn from."""
    validation: Count
    """Further trajectories, from other initial states, that nothing is learnt from."""
    times: Times
    """Samples of each trajectory, with the initial state."""
    interval: Positive
    """Seconds between samples."""
    window: Count
    """How many samples ahead of its start a training window reaches."""

    @field_validator("window")
    @classmethod
    def _inside_a_trajectory(cls, value: int, others: ValidationInfo) -> int:
        times = others.data.get("times")
        if times is not None and value >= times:
            raise ValueError(f"must be at most {times - 1}, one less than times")
        return value

    @property
    def parameters(self) -> PendulumParameters:
        """The forces' own."""
        return PendulumParameters(self.length, self.gravity, self.drag, self.wind)


class PendulumModelConfig(BaseModel):
    """The table `[model]` of a pendulum problem: the perceptron in place of the forces."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (24, 24)
    """Units of each hidden layer."""
    activation: Literal["gelu", "silu", "tanh"] = "tanh"


class PendulumRun(ForecastRun):
    """A whole configuration of a pendulum problem."""

    problem: PendulumConfig
    model: PendulumModelConfig = PendulumModelConfig()
