"""Tables `[problem]` of forecasts.

Nothing here imports torch or PETSc, so that a configuration is validated at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from pnode_dist.config.definition import ProblemTable
from pnode_dist.config.tables import Count

Seed = Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)]
Times = Annotated[int, Field(ge=2, strict=True)]
Layers = Annotated[int, Field(ge=2, strict=True)]


class ForecastTable(ProblemTable):
    """Base class of the table `[problem]` of a forecast."""

    window: Count = 1
    """Length of a training window, in samples after its start."""
    validation: Annotated[int, Field(ge=1, strict=True)] | None = None
    """The number of held-out trajectories, the last ones; of a single trajectory, of held-out times. Default: a
    fifth."""
    missing: Literal["refuse", "mask"] = "refuse"
    """`refuse` raises for values that are not a number. `mask` leaves them out of the loss and of all errors."""


class ComputedTable(ProblemTable):
    """Base class of the table `[problem]` where the trajectories are computed from known equations."""

    seed: Seed = 0
    """Seed of the initial states."""
    trajectories: Count
    """The number of training trajectories."""
    validation: Count
    """The number of held-out trajectories, from other initial states."""
    times: Times
    """Samples per trajectory, including the first."""
    window: Count
    """Length of a training window, in samples after its start."""

    @field_validator("window")
    @classmethod
    def _inside_a_trajectory(cls, value: int, others: ValidationInfo) -> int:
        times = others.data.get("times")
        if times is not None and value >= times:
            raise ValueError(f"must be at most {times - 1}, one less than times")
        return value
