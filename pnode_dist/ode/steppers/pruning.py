"""Pruning of a step's tape: free the stages and inputs that the adjoint does not need."""

from __future__ import annotations

import weakref

from pnode_dist.ode.rhs.evaluation import StageGraph
from pnode_dist.ode.steppers.tableau import Tableau
from pnode_dist.ode.steppers.tape import Tape


def prune(tape: Tape, tableau: Tableau) -> None:
    """Drop inputs of stages that f does not depend on, and results of other stages that only these inputs used.

    A stage without weight in the step's result can have such results. An input whose last reference from Python frees
    it is in no graph, so f does not depend on it.
    """
    dropped = None
    for stage in range(len(tape)):
        graph, tape[stage] = tape[stage], None
        if not isinstance(graph, StageGraph):
            tape[stage] = graph
            continue
        if dropped is None:
            dropped = graph.inputs[0].new_empty(0).requires_grad_()
        leaves, graph = list(graph.inputs), graph._replace(inputs=())
        for part in range(len(leaves)):
            reference = weakref.ref(leaves[part])
            leaves[part] = dropped
            leaf = reference()
            leaves[part] = dropped if leaf is None else leaf
            del leaf
        tape[stage] = graph._replace(inputs=tuple(leaves))
    for stage, graph in enumerate(tape):
        if isinstance(graph, StageGraph) and not tableau.b[stage]:
            later = [other for use, _ in tableau.uses[stage] if isinstance(other := tape[use], StageGraph)]
            roots = [
                root if any(other.inputs[part] is not dropped for other in later) else None
                for part, root in enumerate(graph.roots)
            ]
            tape[stage] = graph._replace(roots=tuple(roots))
