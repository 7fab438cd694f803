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
    """Samples ahead of its start that a training window reaches."""
    validation: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Trajectories held out for validation, the last ones; of a single trajectory its last times. Default: a fifth."""
    missing: Literal["refuse", "mask"] = "refuse"
    """Refuse values that are not a number, or leave them out of the loss and of all errors."""


class ComputedTable(ProblemTable):
    """Base class of the table `[problem]` where the trajectories are computed from known equations."""

    seed: Seed = 0
    """Seeds the initial states, and nothing else."""
    trajectories: Count
    """Trajectories to learn from."""
    validation: Count
    """Further trajectories, from other initial states, that nothing is learnt from."""
    times: Times
    """Samples of each trajectory, with the first."""
    window: Count
    """Samples ahead of its start that a training window reaches."""

    @field_validator("window")
    @classmethod
    def _inside_a_trajectory(cls, value: int, others: ValidationInfo) -> int:
        times = others.data.get("times")
        if times is not None and value >= times:
            raise ValueError(f"must be at most {times - 1}, one less than times")
        return value
