"""Steps of an explicit Runge-Kutta method that follow one another, recorded as one graph of torch's.

One pass of autograd takes the adjoint back over all of them. It computes what the formulas in
`ExplicitStepper.adjoint_step` say, in the same order and so to the last bit, and frees the graph as it goes.
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


class TapeSegment:
    """The graph of steps up to step `last`, from the state before them.

    `start` is where each part of that state comes in, and `roots` where each part of the state after them comes from.
    `evaluations` are those of f that a gradient goes through. While a step may follow, `end` is the state after them
    with its graph, and `after` the same without.
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
        """Whether step `number` from the current state is to be joined to these.

        There is to be time for other things between graphs, which other threads' work or waiting does not matter for.
        """
        if self.after is not current or number != self.last + 1 or self._steps >= _MOST_STEPS:
            return False
        return clock.thread_time() - self._began < _LONG

    def close(self) -> None:
        """Know that no step follows."""
        self.end = self.after = None

    def free(self) -> None:
        """Let go of the graph, which has been reversed: the steps before the last one still hold this."""
        self.start = self.roots = ()

    def record_step(
        self, bound: BoundFunction, layout: StateLayout, tableau: Tableau, time: float, size: float
    ) -> Parts | None:
        """Take the next step, from `time` by `size`; the state after it, in memory that the graph does not need.

        All types are PETSc's scalar type. In `bound` it is noted if f takes derivatives by what its state was
        computed from, such as the parameters: they would be through the state as well. None is returned then, and the
        steps before stay as they are.
        Collective if f is. Raises `RuntimeError` if f writes into the state before the step.
        """
        before = self.end
        assert before is not None
        evaluations = self.evaluations
        grad_mode = torch.is_grad_enabled()
        # As a context this takes as long as a small stage.
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
                    # Each by itself: what f has no use for goes with all that led there.
                    state = tuple(_Watched.apply(bound, part) for part in state)  # type: ignore[no-untyped-call]
                elif not terms:
                    # A node of its own sums up what f adds to the adjoint, as the sums of other stages do.
                    state = tuple(part.view_as(part) for part in state)
                values = bound.evaluate_on_tape(layout, time + node * size, state)
                if [part._version for part in before] != versions:
                    raise RuntimeError(
                        "func changed its state u by an in-place operation: it must return du/dt and leave u alone"
                    )
                self.evaluations += any(value.requires_grad for value in values)
                slopes.append(values)
                if tableau.b[stage]:
                    # One after the other, so that on the way back each multiple of the adjoint is formed when its stage
                    # is due, and not all of them at once.
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
    """The state plus `size` times the terms, of which there is one at least, of the slopes; in memory of its own."""
    (first, weight), *others = terms
    parts = []
    for number, part in enumerate(state):
        sum_of_terms = torch.add(part, slopes[first][number], alpha=size * weight)
        for other, coefficient in others:
            sum_of_terms.add_(slopes[other][number], alpha=size * coefficient)
        parts.append(sum_of_terms)
    return tuple(parts)


def _with_term(state: Parts, result: Parts | None, slope: Parts, weight: float) -> Parts:
    """The result so far, None for the state itself, with a term more, which is added in place if it can be."""
    if result is None:
        return tuple(torch.add(part, rate, alpha=weight) for part, rate in zip(state, slope, strict=True))
    for part, rate in zip(result, slope, strict=True):
        part.add_(rate, alpha=weight)
    return result


def _edges(parts: Parts) -> tuple[GradientEdge, ...]:
    return tuple(map(get_gradient_edge, parts))


class _Start(torch.autograd.Function):
    """The state before the first step, where the graph ends. It holds of it what f saves, and no more."""

    @staticmethod
    def forward(ctx: Any, origin: torch.Tensor, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.detach() for part in parts)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        raise AssertionError("the adjoint is taken where the state comes in")


class _Watched(torch.autograd.Function):
    """A part of the state at a stage, which sees f take derivatives by what it was computed from."""

    @staticmethod
    def forward(ctx: Any, bound: BoundFunction, part: torch.Tensor) -> torch.Tensor:
        # The graph may be held by what f leads to.
        ctx.bound = weakref.ref(bound)
        return part.detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        bound: BoundFunction | None = ctx.bound()
        if bound is not None and not bound.in_backward:
            bound.differentiates = True
        return None, cotangents[0]
