"""Configuration of the Gray-Scott problem: the equations, the trajectories that are computed, and the model.

Nothing here imports torch or PETSc, so that a configuration is validated at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pnode_dist.config.tables import ForecastRun

Count = Annotated[int, Field(ge=1, strict=True)]
Points = Annotated[int, Field(ge=3, strict=True)]
Layers = Annotated[int, Field(ge=2, strict=True)]
Times = Annotated[int, Field(ge=2, strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]


@dataclass(frozen=True)
class GrayScottParameters:
    """du/dt = Du lap(u) - u v^2 + F (1 - u), dv/dt = Dv lap(v) + u v^2 - (F + k) v, on a periodic rectangle.

    `diffusion` is `(Du, Dv)`, `feed` F, `kill` k, `domain` the lengths along y and x; all dimensionless. The defaults
    are those of PETSc's example ts/tutorials/advection-diffusion-reaction/ex5.c, from W. Hundsdorfer, J. G. Verwer:
    Numerical Solution of Time-Dependent Advection-Diffusion-Reaction Equations (2003), p. 21, and J. E. Pearson:
    Complex patterns in a simple system, Science 261 (1993).
    """

    diffusion: tuple[float, float] = (8.0e-5, 4.0e-5)
    feed: float = 0.024
    kill: float = 0.06
    domain: tuple[float, float] = (2.5, 2.5)


class GrayScottConfig(BaseModel):
    """The table `[problem]` with `type = "gray_scott"`: trajectories computed from the equations, to learn them from.

    Times are in the units of the equations, see `GrayScottParameters`. A sample is the state at one time, and samples
    of a trajectory are `interval` apart, the first at time 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["gray_scott"]
    shape: tuple[Points, Points]
    """Points of the grid along y and along x."""
    domain: tuple[Positive, Positive] = GrayScottParameters.domain
    """Lengths of the periodic domain along y and along x."""
    diffusion: tuple[NotNegative, NotNegative] = GrayScottParameters.diffusion
    """Diffusion coefficients of u and of v."""
    feed: NotNegative = GrayScottParameters.feed
    kill: NotNegative = GrayScottParameters.kill
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)] = 0
    """Seeds the initial states, and nothing else."""
    trajectories: Count
    """Trajectories to learn from."""
    validation: Count
    """Further trajectories, from other initial states, that nothing is learnt from."""
    times: Times
    """Samples of each trajectory, with the initial state."""
    interval: Positive
    """Time between samples."""
    window: Count
    """How many samples ahead of its start a training window reaches."""
    processes: tuple[Count, Count] | None = None
    """Ranks along y and along x; by default the split with the shortest inner edges."""

    @field_validator("window")
    @classmethod
    def _inside_a_trajectory(cls, value: int, others: ValidationInfo) -> int:
        times = others.data.get("times")
        if times is not None and value >= times:
            raise ValueError(f"must be at most {times - 1}, one less than times")
        return value

    @property
    def parameters(self) -> GrayScottParameters:
        """The equations' own."""
        return GrayScottParameters(self.diffusion, self.feed, self.kill, self.domain)


class GrayScottModelConfig(BaseModel):
    """The table `[model]` of a Gray-Scott problem: the convolutional right-hand side."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Count = 16
    """Channels between the layers."""
    layers: Layers = 3
    """3 x 3 convolutions, the first from the two species and the last to them."""
    activation: Literal["gelu", "silu", "tanh"] = "silu"


class GrayScottRun(ForecastRun):
    """A whole configuration of a Gray-Scott problem."""

    problem: GrayScottConfig
    model: GrayScottModelConfig = GrayScottModelConfig()
