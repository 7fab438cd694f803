"""The tape of a segment: the data for its adjoint."""

from __future__ import annotations

from pnode_dist.ode.rhs.evaluation import MapTape, StageGraph, StageState
from pnode_dist.ode.steppers.compiled_segment import CompiledTape
from pnode_dist.ode.steppers.graph_tape import GraphTape

Stage = StageGraph | StageState | None
Tape = list[Stage | GraphTape | CompiledTape | MapTape]
"""One entry for each stage, or one graph of all steps; then that of the map between steps, if there is one.

None is a stage that is not needed.
"""


def stages_of(tape: Tape) -> list[Stage]:
    """Return the stages on a tape that is no graph of whole steps."""
    stages = [stage for stage in tape if not isinstance(stage, GraphTape | CompiledTape | MapTape)]
    assert len(stages) == len(tape)
    return stages
