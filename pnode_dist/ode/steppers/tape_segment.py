"""Consecutive steps of an explicit Runge-Kutta method, recorded in one graph of torch: a segment of the tape.

One backward pass of autograd takes the adjoint back over all of them. It evaluates the formulas of
`ExplicitStepper.adjoint_step` in the same order, with the same bits, and frees the graph while it runs.
"""

from __future__ import annotations

import time as clock
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.steppers.tableau import Tableau, Terms
from pnode_dist.system.torch_internals import set_grad_enabled

_ORIGIN = torch.empty(0, requires_grad=True)
_MOST_STEPS, _LONG = 8, 1.0
STATE_WAS_WRITTEN = "func changed its state u by an in-place operation: it must return du/dt and leave u alone"


class TapeSegment:
    """The graph of consecutive steps, the last of which is `last`.

    `start` has the graph's inputs, one edge for each part of the state before the steps, and `roots` its outputs.
    `evaluations` counts the evaluations of f that have a gradient. Until the segment is closed, `end` is the state
    after the steps with its graph, and `after` the same state without.
    """

    def __init__(self, number: int, before: Parts) -> None:
        self.last = number - 1
        self.evaluations = 0
        self.after: Parts | None = None
        with torch.enable_grad():
            self.end: Parts | None = _Start.apply(_ORIGIN, *before)  # type: ignore[no-untyped-call]
        self.start = self.roots = _edges(self.end or ())
        self._steps, self._began = 0, clock.thread_time()

    def can_extend(self, number: int, current: Parts) -> bool:
        """Return True if step `number` from the state `current` may be recorded on this segment.

        A segment is limited in its steps and in this thread's processor time, so that the backward pass returns between
        segments for preemption and progress.
        """
        if self.after is not current or number != self.last + 1 or self._steps >= _MOST_STEPS:
            return False
        return clock.thread_time() - self._began < _LONG

    def close(self) -> None:
        """Close the segment: no step follows."""
        self.end = self.after = None

    def free(self) -> None:
        """Free the graph after its backward pass. The tapes of earlier steps still hold this object."""
        self.start = self.roots = ()

    def record_step(
        self, bound: BoundFunction, layout: StateLayout, tableau: Tableau, time: float, size: float
    ) -> Parts | None:
        """Record the next step, from `time` by `size`, in the type of the state. Collective if f is.

        Returns the state after it without its graph. Returns None if f itself differentiates with respect to tensors
        that its state was computed from, such as the parameters: inside one graph such a derivative would include the
        path through the state, so the joined tape is invalid. The earlier steps of the segment stay valid.
        Raises `RuntimeError` if f writes into the state before the step.
        """
        before = self.end
        assert before is not None
        evaluations = self.evaluations
        grad_mode = torch.is_grad_enabled()
        # The context manager torch.enable_grad() takes as long as a small stage.
        set_grad_enabled(True)
        try:
            versions = [part._version for part in before]
            slopes: list[Parts] = []
            result: Parts | None = None
            for stage, node in enumerate(tableau.c):
                if not tableau.counts[stage]:
                    slopes.append(())
                    continue
                terms = tableau.stage_terms[stage]
                state = combined(before, size, terms, slopes) if terms else before
                for used in tableau.last_uses[stage]:
                    slopes[used] = ()
                if bound.watches:
                    # One node for each part, so that a part which f does not use is freed with its graph.
                    state = tuple(_Watched.apply(bound, part) for part in state)  # type: ignore[no-untyped-call]
                elif not terms:
                    # A separate node sums f's contributions to the adjoint, like the sums of other stages do.
                    state = tuple(part.view_as(part) for part in state)
                values = bound.evaluate_on_tape(layout, time + node * size, state)
                if [part._version for part in before] != versions:
                    raise RuntimeError(STATE_WAS_WRITTEN)
                self.evaluations += any(value.requires_grad for value in values)
                slopes.append(values)
                if tableau.b[stage]:
                    # Add one term at a time: the backward pass then forms each multiple of the adjoint at its stage,
                    # not all of them at once.
                    result = _with_term(before, result, values, size * tableau.b[stage])
            assert result is not None
            if bound.differentiates:
                self.evaluations = evaluations
                return None
            self.end = result
            bound.check_dependencies(self.end, (_ORIGIN,))
            self.roots = _edges(self.end)
        finally:
            set_grad_enabled(grad_mode)
        self.last += 1
        self._steps += 1
        self.after = tuple(part.detach() for part in self.end)
        return self.after


def combined(state: Parts, size: float, terms: Terms, slopes: Sequence[Parts]) -> Parts:
    """Return the state plus `size` times the weighted sum of slopes in `terms`, at least one, in new memory."""
    (first, weight), *others = terms
    parts = []
    for number, part in enumerate(state):
        sum_of_terms = torch.add(part, slopes[first][number], alpha=size * weight)
        for other, coefficient in others:
            sum_of_terms.add_(slopes[other][number], alpha=size * coefficient)
        parts.append(sum_of_terms)
    return tuple(parts)


def _with_term(state: Parts, result: Parts | None, slope: Parts, weight: float) -> Parts:
    """Add a weighted slope to the result so far; None is the state itself. Adds in place where possible."""
    if result is None:
        return tuple(torch.add(part, rate, alpha=weight) for part, rate in zip(state, slope, strict=True))
    for part, rate in zip(result, slope, strict=True):
        part.add_(rate, alpha=weight)
    return result


def _edges(parts: Parts) -> tuple[GradientEdge, ...]:
    return tuple(map(get_gradient_edge, parts))


class _Start(torch.autograd.Function):
    """The node at the start of the segment. It does not keep the state before the first step alive."""

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
