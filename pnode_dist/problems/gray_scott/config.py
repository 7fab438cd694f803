"""Configuration of the Gray-Scott problem: the equations, the trajectories that are computed, and the model.

Nothing here imports torch or PETSc, so that a configuration is validated at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from pnode_dist.config.definition import ModelTable
from pnode_dist.config.tables import Count, ForecastRun, InverseConfig, NotNegative, Positive
from pnode_dist.problems.common.tables import ComputedTable, Layers

Points = Annotated[int, Field(ge=3, strict=True)]


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


class GrayScottConfig(ComputedTable):
    """The table `[problem]` with `type = "gray_scott"`: trajectories computed from the equations, to learn them from.

    Times are in the units of the equations, see `GrayScottParameters`. A sample is the state at one time, and samples
    of a trajectory are `interval` apart, the first at time 0.
    """

    type: Literal["gray_scott"]
    """The name of the problem."""
    shape: tuple[Points, Points]
    """Grid points along y and along x."""
    domain: tuple[Positive, Positive] = GrayScottParameters.domain
    """Lengths of the periodic domain along y and along x, dimensionless."""
    diffusion: tuple[NotNegative, NotNegative] = GrayScottParameters.diffusion
    """Diffusion coefficients of u and of v, dimensionless."""
    feed: NotNegative = GrayScottParameters.feed
    """The feed rate F, dimensionless."""
    kill: NotNegative = GrayScottParameters.kill
    """The kill rate k, dimensionless."""
    interval: Positive
    """Time between samples, dimensionless."""
    processes: tuple[Count, Count] | None = None
    """Ranks along y and along x. Default: the split with the shortest inner edges."""

    @property
    def parameters(self) -> GrayScottParameters:
        """The equations' own."""
        return GrayScottParameters(self.diffusion, self.feed, self.kill, self.domain)


class GrayScottModelConfig(ModelTable):
    """The table `[model]` of a Gray-Scott problem: the convolutional right-hand side."""

    channels: Count = 16
    """Channels of each hidden layer."""
    layers: Layers = 3
    """The number of 3 x 3 convolutions, including the first and the last."""
    activation: Literal["gelu", "silu", "tanh"] = "silu"
    """The activation function between layers."""


class GrayScottInverseConfig(InverseConfig):
    """The table `[inverse]` of a Gray-Scott problem: the initial state of a trajectory, from observations of it.

    The observed trajectory is the first one for validation. The equations are the model, by the steps of `[solver]`.
    Observations are made at every `every`-th point along both axes, at the `observed` samples after the first, of both
    species, with independent errors drawn from the run's seed. The first guess is u = 1, v = 0, the state at rest,
    which is also the mean of the prior.
    """

    every: Count = 4
    """Grid points between observed points, along both axes."""
    observed: Count = 4
    """Samples that are observed: the first one after the initial state, and those that follow it."""
    noise: Positive = 0.02
    """Standard deviation of the errors of the observations, dimensionless."""
    deviation: tuple[Positive, Positive] = (0.2, 0.1)
    """Standard deviations of the prior of u and of v, dimensionless."""
    length: Positive = 0.05
    """Correlation length of the prior, in the units of `domain`."""


class GrayScottRun(ForecastRun):
    """A whole configuration of a Gray-Scott problem."""

    problem: GrayScottConfig
    model: GrayScottModelConfig = GrayScottModelConfig()
    inverse: GrayScottInverseConfig = GrayScottInverseConfig()
