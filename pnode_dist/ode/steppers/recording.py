"""What is kept of a step for its adjoint."""

from __future__ import annotations

from pnode_dist.ode.rhs.evaluation import StageGraph, StageState
from pnode_dist.ode.steppers.tape import JoinedSteps

Stage = StageGraph | StageState | None
Recording = list[Stage | JoinedSteps]
"""Stage by stage, or the graph that the step is part of."""


def stages_of(recording: Recording) -> list[Stage]:
    """Stage by stage, where nothing is joined."""
    stages = [stage for stage in recording if not isinstance(stage, JoinedSteps)]
    assert len(stages) == len(recording)
    return stages
