"""The tape of explicit steps by stages: one graph for each stage, or only the state from which it is recomputed."""

from __future__ import annotations

import torch

from pnode_dist.ode.rhs.evaluation import BoundFunction, StageGraph, StageState
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.ownership import owned
from pnode_dist.ode.rhs.products import step_cotangents, vjp
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.adjoint_sums import AdjointSums, Products
from pnode_dist.ode.steppers.explicit_step import Scheme, pull_back_step, take_step

STATE_WAS_WRITTEN = "func changed its state u by an in-place operation: it must return du/dt and leave u alone"

Stages = list[StageGraph | StageState]
"""The tape: the stages that the results of the steps depend on, in order."""


class ByStage:
    """The evaluations of f outside a graph of several stages. Appends each to `stages`, unless `level` is None.

    At the `level` "graph" a stage is a graph, at "stages" its state. Collective if f is. Raises `RuntimeError` if f
    writes into the state.
    """

    def __init__(self, bound: BoundFunction, layout: StateLayout, level: str | None) -> None:
        self._bound, self._layout, self._level = bound, layout, level
        self.stages: Stages = []

    def __call__(self, time: float, state: Parts, half: int | None = None) -> Parts:
        """Return f at `time` and `state`, in the type of the state. Gradients must be disabled."""
        bound, layout, level = self._bound, self._layout, self._level
        func = bound.func if half is None else bound.halves[half]
        inputs = layout.inputs(state) if layout.converts else state
        if torch.is_inference_mode_enabled():
            # Tensors have no version there, so a write by f into the state could not be detected.
            inputs = tuple(part.clone() for part in inputs)
            return self._values(bound.value(func, layout, time, inputs))
        versions = [part._version for part in inputs]
        if level == "graph":
            graph = bound.graph(func, layout, time, inputs)
            values = tuple(map(layout.scalar, graph.values)) if layout.converts else graph.values
            # First-order products at constant times do not need the values.
            self.stages.append(graph if bound.needs_time_gradient else graph._replace(values=()))
        elif level is None:
            values = self._values(bound.value(func, layout, time, inputs))
        else:
            mark = bound.carried.mark()
            values = bound.value(func, layout, time, inputs)
            # Before the fingerprint, which lends the memory to NumPy: after that every value counts as shared.
            values = values if layout.converts else owned(values)
            self.stages.append(bound.stage_checkpoint(time, inputs, mark, values))
            values = self._values(values) if layout.converts else values
        if [part._version for part in inputs] != versions:
            raise RuntimeError(STATE_WAS_WRITTEN)
        return values

    def _values(self, values: Parts) -> Parts:
        layout = self._layout
        return owned(tuple(map(layout.scalar, values)) if layout.converts else values)


def record_stages(
    bound: BoundFunction, layout: StateLayout, tableau: Scheme, segment: Segment, state: Parts, level: str
) -> tuple[Parts, Stages]:
    """Return the state after the steps, and their tape at the `level`. Collective if f is."""
    evaluate = ByStage(bound, layout, level)
    with torch.no_grad():
        for time, size in zip(segment.starts, segment.sizes, strict=True):
            state = take_step(tableau, time, size, state, evaluate)
    return state, evaluate.stages


def pull_back_stages(
    bound: BoundFunction, layout: StateLayout, tableau: Scheme, segment: Segment, stages: Stages, sums: AdjointSums
) -> list[tuple[float, float]]:
    """Take adjoint and gradient in `sums` back over the steps of a tape, which is emptied. Collective if f is.

    Returns h dL/dh and dL/dt_n of each step; nothing if the gradient with respect to times is not needed.
    """
    by_times: list[tuple[float, float]] = []
    for time, size in reversed(list(zip(segment.starts, segment.sizes, strict=True))):

        def pull_back(cotangents: Products, half: int | None = None, time: float = time) -> Products:
            graph = stages.pop()
            if isinstance(graph, StageState):
                func = bound.func if half is None else bound.halves[half]
                graph = bound.recomputed_graph(graph, func, layout)
            found = vjp(bound, graph, cotangents)
            times = step_cotangents(found, graph.when - time) if bound.needs_time_gradient else []
            sums.add_to_gradient([*found.parameters, *times])
            if not layout.converts:
                return found.states
            return [None if product is None else layout.scalar(product) for product in found.states]

        sums.adjoint = pull_back_step(tableau, size, sums.adjoint, pull_back)
        if bound.needs_time_gradient:
            by_times.append(sums.take_time_gradients())
    return by_times[::-1]
