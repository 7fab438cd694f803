"""The tape of a step: the data for its adjoint."""

from __future__ import annotations

from pnode_dist.ode.rhs.evaluation import StageGraph, StageState
from pnode_dist.ode.steppers.compiled_segment import CompiledTape
from pnode_dist.ode.steppers.tape_segment import TapeSegment

Stage = StageGraph | StageState | None
Tape = list[Stage | TapeSegment | CompiledTape]
"""One entry for each stage, or the single graph of several steps. None is a stage that is not needed."""


def stages_of(tape: Tape) -> list[Stage]:
    """Return the stages on the tape of a step that is not part of a segment."""
    stages = [stage for stage in tape if not isinstance(stage, TapeSegment | CompiledTape)]
    assert len(stages) == len(tape)
    return stages
