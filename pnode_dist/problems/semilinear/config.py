"""Configuration of the two semilinear problems on a periodic line: Kuramoto-Sivashinsky and viscous Burgers.

Nothing here imports torch or PETSc, so that a configuration is validated at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from pnode_dist.config.definition import ModelTable
from pnode_dist.config.tables import Count, ForecastRun, NotNegative, Positive
from pnode_dist.problems.common.tables import ComputedTable, Layers

Points = Annotated[int, Field(ge=8, strict=True)]


@dataclass(frozen=True)
class LineEquation:
    """u_t + u u_x = a u_xx + b u_xxxx on a periodic line of some `length`; a is `second`, b is `fourth`.

    Initial states are random sums of the longest `waves` sines of the line, of root mean square 1.
    """

    title: str
    length: float
    second: float
    fourth: float
    waves: int


class LineConfig(ComputedTable):
    """Base class of the tables `[problem]` of both equations: trajectories that are computed, to learn them from.

    A sample is the state at one time, and samples of a trajectory are `interval` apart.
    """

    points: Points
    """The number of grid points."""
    interval: Positive
    """Time between samples, dimensionless."""
    spin_up: NotNegative
    """Time from the initial state to the first sample, dimensionless."""

    @property
    def equation(self) -> LineEquation:
        """The equation with its coefficients."""
        raise NotImplementedError


class KuramotoSivashinskyConfig(LineConfig):
    """The table `[problem]` with `type = "kuramoto_sivashinsky"`: u_t + u u_x = -u_xx - u_xxxx, dimensionless."""

    type: Literal["kuramoto_sivashinsky"]
    """The name of the problem."""
    length: Annotated[Positive, Field(validate_default=True)] = 176.0
    """Length of the periodic line, dimensionless. Must be less than twice the number of points. The default suits 512
    points: their spacing is that of 64 points on a line of length 22."""
    spin_up: NotNegative = 50.0
    """Time from the initial state to the first sample, dimensionless."""

    @field_validator("length")
    @classmethod
    def _damped(cls, value: float, others: ValidationInfo) -> float:
        points = others.data.get("points")
        # The differences see the shortest wave grow where points are 2 or more apart.
        if points is not None and value >= 2 * points:
            raise ValueError(f"must be less than {2 * points}, twice the number of points, so that short waves decay")
        return value

    @property
    def equation(self) -> LineEquation:
        """Waves longer than 2 pi grow, and are what the initial states are of."""
        waves = max(1, int(self.length / (2 * math.pi)))
        return LineEquation("Kuramoto-Sivashinsky", self.length, -1.0, -1.0, waves)


class BurgersConfig(LineConfig):
    """The table `[problem]` with `type = "burgers"`: u_t + u u_x = nu u_xx, dimensionless."""

    type: Literal["burgers"]
    """The name of the problem."""
    length: Positive = 1.0
    """Length of the periodic line, dimensionless."""
    viscosity: Positive = 0.01
    """The viscosity nu, dimensionless."""
    spin_up: NotNegative = 0.0
    """Time from the initial state to the first sample, dimensionless."""

    @property
    def equation(self) -> LineEquation:
        """Four long waves steepen into fronts."""
        return LineEquation("viscous Burgers", self.length, self.viscosity, 0.0, 4)


class SemilinearModelConfig(ModelTable):
    """The table `[model]` of both problems: the convolutional part of the right-hand side."""

    channels: Count = 16
    """Channels of each hidden layer."""
    layers: Layers = 3
    """The number of convolutions along the line, including the first and the last."""
    kernel_size: Count = 5
    """Width of the stencil of each convolution, in points. Must be odd."""
    activation: Literal["gelu", "silu", "tanh"] = "silu"
    """The activation function between layers."""

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd, so that the line keeps its size")
        return value


class KuramotoSivashinskyRun(ForecastRun):
    """A whole configuration of a Kuramoto-Sivashinsky problem."""

    problem: KuramotoSivashinskyConfig
    model: SemilinearModelConfig = SemilinearModelConfig()


class BurgersRun(ForecastRun):
    """A whole configuration of a Burgers problem."""

    problem: BurgersConfig
    model: SemilinearModelConfig = SemilinearModelConfig()


SemilinearRun = KuramotoSivashinskyRun | BurgersRun
