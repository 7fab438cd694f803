"""The tape of consecutive explicit steps as one graph of torch.

One backward pass of autograd takes the adjoint back over all of them, and frees the graph while it runs. The result has
the same bits for any division of the steps into graphs.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge

from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.ownership import owned
from pnode_dist.ode.rhs.products import pull_back
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.adjoint_sums import AdjointSums
from pnode_dist.ode.steppers.explicit_step import Scheme, take_step
from pnode_dist.ode.steppers.stage_tape import STATE_WAS_WRITTEN
from pnode_dist.system.torch_internals import root_edge

_ORIGIN = torch.empty(0, requires_grad=True)


class GraphTape(NamedTuple):
    """A graph from the state `start` to `roots`. `vjps` counts the evaluations of f that have a gradient."""

    start: tuple[GradientEdge, ...]
    roots: tuple[GradientEdge, ...]
    vjps: int


class CannotJoinError(Exception):
    """f differentiates with respect to tensors that its state was computed from, such as the parameters.

    Inside one graph such a derivative would include the path through the state, so the graph is invalid.
    """


def record_graph(
    bound: BoundFunction, layout: StateLayout, tableau: Scheme, segment: Segment, state: Parts
) -> tuple[Parts, GraphTape]:
    """Return the state after the steps without its graph, and their tape, with the map after each. Collective if f is.

    Raises `RuntimeError` if f writes into a state, and `CannotJoinError`.
    """
    start = start_of_graph(state)
    with torch.enable_grad():
        evaluate = OnGraph(bound, layout)
        after = start
        for time, size, end in zip(segment.starts, segment.sizes, segment.ends, strict=True):
            after = take_step(tableau, time, size, after, evaluate)
            if bound.between is not None:
                after = evaluate.mapped(end, after)
    return closed(bound, start, after, evaluate.vjps)


def start_of_graph(state: Parts) -> Parts:
    """Return the same values as the start of a graph. The graph does not keep the state alive, unlike leaves of it."""
    with torch.enable_grad():
        started: Parts = _Start.apply(_ORIGIN, *(part.detach() for part in state))  # type: ignore[no-untyped-call]
    return started


def closed(bound: BoundFunction, start: Parts, after: Parts, vjps: int) -> tuple[Parts, GraphTape]:
    """Return the result `after` of a graph from `start` without its graph, and the tape."""
    bound.check_dependencies(after, (_ORIGIN,))
    return tuple(part.detach() for part in after), GraphTape(_edges(start), _edges(after), vjps)


def _edges(parts: Parts) -> tuple[GradientEdge, ...]:
    return tuple(map(root_edge, parts))


def pull_back_graph(bound: BoundFunction, tape: GraphTape, sums: AdjointSums) -> None:
    """Take adjoint and gradient in `sums` back over the steps of a tape. Collective if f is."""
    bound.vjps += tape.vjps
    found = pull_back(bound, tape.roots, (*tape.start, *bound.parameters.tensors), sums.adjoint, sums=sums.gradient)
    parts = len(tape.start)
    sums.adjoint = [part for part in found[:parts] if part is not None]
    sums.replace_gradient(found[parts:])


class OnGraph:
    """The evaluations of f in one graph, counted in `vjps` if they have a gradient. Collective if f is.

    Raises `RuntimeError` if f writes into the state, and `CannotJoinError`.
    """

    def __init__(self, bound: BoundFunction, layout: StateLayout) -> None:
        self._bound, self._layout = bound, layout
        self.vjps = 0

    def __call__(self, time: float, state: Parts, half: int | None = None) -> Parts:
        """Return f at `time` and `state`. Gradients must be enabled."""
        bound = self._bound
        if bound.watches:
            state = _watched(bound, state)
        versions = [part._version for part in state]
        values = bound.evaluate_on_tape(self._layout, time, state, half)
        if [part._version for part in state] != versions:
            raise RuntimeError(STATE_WAS_WRITTEN)
        if bound.differentiates:
            raise CannotJoinError
        # A plain loop: a generator would take a noticeable part of a small stage.
        for value in values:
            if value.requires_grad:
                self.vjps += 1
                break
        return values

    def mapped(self, time: float, state: Parts) -> Parts:
        """Return the map between steps at `time` and `state`. Gradients must be enabled. Collective if it is."""
        bound, layout = self._bound, self._layout
        inputs = tuple(part.to(layout.device, layout.dtype) for part in _watched(bound, state))
        values = owned(tuple(map(layout.scalar, bound.mapped(layout, time, inputs))))
        if bound.differentiates:
            raise CannotJoinError
        return values


def _watched(bound: BoundFunction, state: Parts) -> Parts:
    watched: Parts = tuple(_Watched.apply(bound, part) for part in state)  # type: ignore[no-untyped-call]
    return watched


class _Start(torch.autograd.Function):
    """The node at the start of a graph."""

    @staticmethod
    def forward(ctx: Any, origin: torch.Tensor, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.detach() for part in parts)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        raise AssertionError("the backward pass ends at the inputs of this node")


class _Watched(torch.autograd.Function):
    """The identity on a part of a stage's state. Its backward detects derivatives that f takes through the state."""

    @staticmethod
    def forward(ctx: Any, bound: BoundFunction, part: torch.Tensor) -> torch.Tensor:
        # Weak, because f may lead to objects that hold this graph.
        ctx.bound = weakref.ref(bound)
        return part.detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        bound: BoundFunction | None = ctx.bound()
        if bound is not None and not bound.in_backward:
            bound.differentiates = True
        return None, cotangents[0]
