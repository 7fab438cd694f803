"""Configuration of the Robertson problem: the reactions, the trajectories that are computed, the model and its rival.

Nothing here imports torch or PETSc, so that a configuration is validated at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StrictStr, ValidationInfo, field_validator

from pnode_dist.config.definition import ModelTable
from pnode_dist.config.tables import Count, ForecastRun, NotNegative, Positive, Table
from pnode_dist.ode import methods
from pnode_dist.problems.common.tables import ComputedTable, Times

Concentrations = tuple[NotNegative, NotNegative, NotNegative]
RATES = (0.04, 3.0e7, 1.0e4)


class RobertsonConfig(ComputedTable):
    """The table `[problem]` with `type = "robertson"`: trajectories computed from the reactions, to learn them from.

    dy1/dt = -k1 y1 + k3 y2 y3, dy2/dt = k1 y1 - k2 y2^2 - k3 y2 y3, dy3/dt = k2 y2^2 (H. H. Robertson 1966; E. Hairer,
    G. Wanner: Solving Ordinary Differential Equations II, section IV.1). All is dimensionless. The samples of a
    trajectory are spaced evenly in the logarithm of time.
    """

    type: Literal["robertson"]
    """The name of the problem."""
    rates: tuple[Positive, Positive, Positive] = RATES
    """The rate constants (k1, k2, k3), dimensionless."""
    times: Times = 40
    """Samples per trajectory, evenly spaced in the logarithm of time."""
    first: Positive = 1.0e-5
    """Time of the first sample, dimensionless. The model starts there."""
    last: Positive = 100.0
    """Time of the last sample, dimensionless. Must be later than `first`."""
    lowest: Concentrations = (0.5, 0.0, 0.0)
    """Lower bounds of the initial concentrations at time 0, which are drawn uniformly."""
    highest: Concentrations = (1.0, 5.0e-5, 0.5)
    """Upper bounds of the initial concentrations at time 0."""
    validation: Count
    """The number of held-out trajectories. The first starts from (1, 0, 0), the initial value of Robertson's problem;
    the others from drawn concentrations."""

    @field_validator("last")
    @classmethod
    def _later_than_the_first(cls, value: float, others: ValidationInfo) -> float:
        first = others.data.get("first")
        if first is not None and value <= first:
            raise ValueError(f"must be greater than {first:g}, the first")
        return value

    @field_validator("highest")
    @classmethod
    def _above_the_lowest(cls, value: tuple[float, ...], others: ValidationInfo) -> tuple[float, ...]:
        lowest = others.data.get("lowest")
        if lowest is not None and any(high < low for low, high in zip(lowest, value, strict=True)):
            raise ValueError(f"must be at least {list(lowest)}, the lowest")
        return value


class RobertsonModelConfig(ModelTable):
    """The table `[model]` of a Robertson problem: the perceptron in the right-hand side."""

    hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (6, 6, 6, 6, 6)
    """Units of each hidden layer."""
    bias: bool = False
    """Add a bias in each layer."""
    activation: Literal["gelu", "silu", "tanh"] = "gelu"
    """The activation function between layers."""


def _adaptive(name: str) -> str:
    method = methods.resolve(name)
    if method.implicit or not method.estimates_error:
        raise ValueError(f"method = {name!r}: must be an explicit method with an error estimate, such as dopri5")
    return name


class RivalConfig(Table):
    """The table `[rival]`: the explicit method with error control by which `evaluate` solves the trained model too."""

    method: Annotated[StrictStr, AfterValidator(_adaptive)] = "dopri5"
    """An explicit method with an error estimate, a name from `pnode-dist methods`."""
    rtol: Positive = 1e-6
    """Relative tolerance."""
    atol: Positive = 1e-6
    """Absolute tolerance, in scaled concentrations."""
    steps: Count = 20_000
    """Stop at the first sample after this many steps."""


class RobertsonRun(ForecastRun):
    """A whole configuration of a Robertson problem."""

    problem: RobertsonConfig
    model: RobertsonModelConfig = RobertsonModelConfig()
    rival: RivalConfig = RivalConfig()
