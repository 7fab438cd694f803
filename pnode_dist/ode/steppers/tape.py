"""What is kept of a step for its adjoint."""

from __future__ import annotations

from pnode_dist.ode.rhs.evaluation import StageGraph, StageState
from pnode_dist.ode.steppers.tape_segment import TapeSegment

Stage = StageGraph | StageState | None
Tape = list[Stage | TapeSegment]
"""Stage by stage, or the graph that the step is part of."""


def stages_of(tape: Tape) -> list[Stage]:
    """Stage by stage, where nothing is joined."""
    stages = [stage for stage in tape if not isinstance(stage, TapeSegment)]
    assert len(stages) == len(tape)
    return stages
