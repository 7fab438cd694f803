"""A step of an explicit method as a function that torch can trace, for `compiled_segment`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pnode_dist.ode.rhs.evaluation import BoundFunction, Function
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.compiled_segment import Step, TracedStep, Turns
from pnode_dist.ode.steppers.explicit_step import Scheme
from pnode_dist.ode.steppers.graph_tape import CannotJoinError, record_graph
from pnode_dist.ode.steppers.stage_tape import STATE_WAS_WRITTEN
from pnode_dist.ode.steppers.symplectic_step import Composition, traceable_step
from pnode_dist.ode.steppers.tableau import Tableau


def traced_explicit(
    func: Function,
    layout: StateLayout,
    scheme: Scheme,
    records: bool,
    attempts: bool = False,
    between: Callable[..., Parts] | None = None,
) -> TracedStep:
    """Return the step of a Runge-Kutta or symplectic method, with the map `between` steps at its end.

    With `attempts` it has no map, and also returns f at all stages, also at those that the result does not depend on.
    """
    step: Step
    if isinstance(scheme, Composition):
        step = traceable_step(func, layout, scheme)
    else:
        step = _step(func, layout, scheme, attempts)
    maps = between is not None and not attempts
    if between is not None and not attempts:
        step = _mapped(step, between, layout)
    stages = sum(scheme.counts)
    refusal = partial(_two_steps, layout, scheme) if records else partial(one_evaluation, layout)
    return TracedStep(step, len(scheme.c) if attempts else stages, stages, refusal, maps=maps)


def _step(func: Function, layout: StateLayout, tableau: Tableau, attempts: bool) -> Step:
    # Plain values, because torch's compiler cannot look into the locks of cached properties.
    is_tuple, shapes, device, dtype = layout.is_tuple, layout.shapes, layout.device, layout.compute_dtype
    state_device, state_dtype, result_terms = layout.vec_device, layout.state_dtype, tableau.result_terms
    stages = tuple(zip(tableau.c, tableau.counts, tableau.stage_terms, strict=True))

    def step(state: Parts, turns: Turns, args: tuple[Any, ...]) -> Parts:
        starts, sizes = turns
        start, size = starts[0], sizes[0]
        slopes: list[Parts] = []
        for node, counts, terms in stages:
            if not (counts or attempts):
                slopes.append(())
                continue
            inputs = [part.to(device, dtype) for part in _sum(state, size, terms, slopes)]
            time = (start + node * size).to(device, dtype)
            value = func(time, tuple(inputs) if is_tuple else inputs[0], *args)
            values = tuple(value) if is_tuple else (value,)
            for part, shape in zip(values, shapes, strict=True):
                if part.shape != shape or not part.dtype.is_floating_point:
                    raise TypeError("func returned another shape or type than its state's")
            slopes.append(tuple([part.to(state_device, state_dtype) for part in values]))
        result = _sum(state, size, result_terms, slopes)
        return (*result, *[part.detach() for slope in slopes for part in slope]) if attempts else result

    return step


def _mapped(step: Step, between: Callable[..., Parts], layout: StateLayout) -> Step:
    """Return the step with the map after it."""
    device, dtype, state_device, state_dtype = layout.device, layout.dtype, layout.vec_device, layout.state_dtype

    def mapped(state: Parts, turns: Turns, args: tuple[Any, ...]) -> Parts:
        after = tuple([part.to(device, dtype) for part in step(state, turns, args)])
        starts, sizes = turns
        values = between((starts[0] + sizes[0]).to(device, dtype), after, *args)
        return tuple([part.to(state_device, state_dtype) for part in values])

    return mapped


def _sum(
    state: Sequence[torch.Tensor], size: torch.Tensor, terms: Sequence[tuple[int, float]], slopes: list[Parts]
) -> Parts:
    """Return the state plus `size` times the weighted sum of slopes."""
    result = []
    for number, part in enumerate(state):
        for stage, weight in terms:
            part = part + (size * weight) * slopes[stage][number]
        result.append(part)
    return tuple(result)


def _two_steps(
    layout: StateLayout, tableau: Scheme, bound: BoundFunction, state: Parts, start: float, size: float
) -> str | None:
    """Take two steps in one graph, uncompiled. Returns why this cannot be right, or None.

    Raises `RuntimeError` if f writes into its state.
    """
    layout = replace(layout, state_dtype=layout.compute_dtype, vec_device=layout.device)
    watches, bound.watches = bound.watches, True
    try:
        segment = Segment(0, (start, start), (size, size))
        record_graph(bound, layout, tableau, segment, layout.inputs(state, copy=True))
    except CannotJoinError:
        return "func differentiates with respect to its own parameters"
    finally:
        bound.watches, bound.differentiates = watches, False
    return None


def one_evaluation(layout: StateLayout, bound: BoundFunction, state: Parts, start: float, size: float) -> None:
    """Evaluate f and the map at a copy of the state, uncompiled. Raises an error if one writes into its state."""
    with torch.inference_mode(False):
        inputs = layout.inputs(state, copy=True)
    versions = [part._version for part in inputs]
    bound.value(bound.func, layout, start, inputs)
    if [part._version for part in inputs] != versions:
        raise RuntimeError(STATE_WAS_WRITTEN)
    if bound.between is not None:
        bound.between_value(layout, start, tuple(part.to(layout.dtype) for part in inputs))
