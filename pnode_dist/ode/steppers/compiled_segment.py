"""Segments of explicit Runge-Kutta steps as one compiled function, forward and backward.

torch.compile traces the loop over the steps, with the stages and f inside it. Its guards and the Python code of a call
are then paid once a segment. The code does not grow with the number of steps where torch compiles the loop itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from mpi4py import MPI
from torch.autograd.graph import GradientEdge

from pnode_dist.ode.rhs.compiled import Compiler
from pnode_dist.ode.rhs.evaluation import BoundFunction, Function
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.products import pull_back
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.adjoint_sums import Products
from pnode_dist.ode.steppers.explicit_step import Scheme
from pnode_dist.ode.steppers.graph_tape import CannotJoinError, record_graph
from pnode_dist.ode.steppers.stage_tape import STATE_WAS_WRITTEN
from pnode_dist.ode.steppers.step_loop import Backend, looping, repeating
from pnode_dist.ode.steppers.symplectic_step import Composition, traceable_step
from pnode_dist.ode.steppers.tableau import Tableau
from pnode_dist.system.compile_order import compile_in_turn
from pnode_dist.system.torch_internals import (
    compiler_errors,
    mark_length_as_dynamic,
    root_edge,
    set_grad_enabled,
    traces_inner_derivatives,
)

_SEGMENTS: tuple[tuple[Callable[[Backend], Backend], int], ...] = ((looping, 50), (repeating, 5))
_ATTEMPT: tuple[tuple[Callable[[Backend], Backend], int], ...] = ((lambda backend: backend, 1),)
"""Ways to compile steps, the best one first, and the largest number of steps of each."""

_Steps = Callable[[Parts, torch.Tensor, torch.Tensor, tuple[Any, ...]], Parts]


class CompiledTape(NamedTuple):
    """The graph of a segment: its inputs, which are the state before it and the times of its steps, and its roots.

    Without roots the graph is made when it is needed.
    """

    start: Parts
    starts: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    roots: tuple[GradientEdge, ...] = ()


class CompiledSegments:
    """The compiled segments of one right-hand side, layout and method, for solves with or without a gradient.

    With `attempts` they have one step each, whose slopes are known too, so that its error can be estimated. Other steps
    end with the map `between` steps, if there is one: then `maps` is True.
    `most` is the largest number of steps of a segment. It is 0 if the right-hand side cannot be compiled, None before
    the first call of `prepare`.
    """

    def __init__(
        self,
        compiler: Compiler,
        func: Function,
        layout: StateLayout,
        tableau: Scheme,
        records: bool,
        attempts: bool = False,
        between: Callable[..., Parts] | None = None,
    ) -> None:
        self._layout, self._tableau, self._records, self.attempts = layout, tableau, records, attempts
        self._stages = sum(tableau.counts)
        self._evaluations = len(tableau.c) if attempts else self._stages
        if isinstance(tableau, Composition):
            self._step = traceable_step(func, layout, tableau)
        else:
            self._step = _step(func, layout, tableau, attempts)
        self.maps = between is not None and not attempts
        if between is not None and not attempts:
            self._step = _mapped(self._step, between, layout)
        self._compile = partial(compiler.compile, self._step, layout.device)
        self._loops, self._run = False, self._step
        self.most: int | None = None

    def prepare(self, comm: MPI.Comm, bound: BoundFunction, state: Parts, start: float, size: float) -> int:
        """Compile, and return the largest number of steps of a segment, 0 if that is not possible, with a warning.

        Takes steps from `state` at `start` by `size`. Changes nothing that f carries from one evaluation to the next.
        Collective on `comm`, that of the solver: all of its ranks get the same number.
        """
        if comm.allreduce(self.most is None, MPI.LOR):
            counts = bound.counts()
            with bound.carried.aside():
                take = _two_steps if self._records else _one_evaluation
                reason = take(bound, self._layout, self._tableau, state, start, size)
                if bound.carried.has_changed():
                    reason = "func draws random numbers, or changes tensors or attributes"
                reason = next(filter(None, comm.allgather(reason)), None)
                self.most = 0
                for transform, most in _ATTEMPT if self.attempts else _SEGMENTS:
                    self._loops = transform is looping
                    # Exchanges between ranks have no order in a loop.
                    if not (self.most or reason) and not (self._loops and comm.size > 1):
                        self._run = self._compile(transform)
                        count = 2 if self._loops else most
                        segment = Segment(0, (start,) * count, (size,) * count)
                        error = _error_of(partial(self._try, bound, state, segment), comm)
                        self.most = most if error is None else 0
                        reason = None if self._loops else error
            bound.count_from(counts)
            if reason and comm.rank == 0:
                warnings.warn(f"compile: steps are not compiled, because {reason}", RuntimeWarning, stacklevel=2)
        assert self.most is not None
        return self.most

    def _try(self, bound: BoundFunction, state: Parts, segment: Segment) -> None:
        if not self._records:
            self.advance(bound, segment, state)
            return
        result, tape = self.record(bound, segment, state)
        adjoint = [torch.zeros_like(part) for part in result]
        self.pull_back(bound, tape, adjoint)

    def advance(self, bound: BoundFunction, segment: Segment, state: Parts) -> Parts:
        """Return the state after the steps."""
        return self._without_tape(bound, segment, state)[: len(state)]

    def record(self, bound: BoundFunction, segment: Segment, state: Parts) -> tuple[Parts, CompiledTape]:
        """Return the state after the steps, and their tape."""
        found, tape = self._with_tape(bound, segment, state)
        return found[: len(state)], tape

    def attempt(
        self, bound: BoundFunction, segment: Segment, state: Parts, records: bool
    ) -> tuple[Parts, list[Parts], CompiledTape | None]:
        """Return the state after the only step, f at all of its stages, and its tape if it `records`."""
        found, tape = self._with_tape(bound, segment, state) if records else (None, None)
        found = self._without_tape(bound, segment, state) if found is None else found
        parts = len(state)
        slopes = [found[first : first + parts] for first in range(parts, len(found), parts)]
        return found[:parts], slopes, tape

    def _without_tape(self, bound: BoundFunction, segment: Segment, state: Parts) -> Parts:
        bound.evaluations += self._evaluations * len(segment)
        starts, sizes = segment.tensors()
        with torch.no_grad():
            return self._steps(bound, state, starts, sizes)

    def _with_tape(self, bound: BoundFunction, segment: Segment, state: Parts) -> tuple[Parts, CompiledTape]:
        bound.evaluations += self._evaluations * len(segment)
        starts, sizes = segment.tensors()
        if bound.needs_time_gradient:
            starts.requires_grad_()
            sizes.requires_grad_()
        start = tuple(part.detach().requires_grad_() for part in state)
        before = torch.is_grad_enabled()
        set_grad_enabled(True)
        try:
            result = self._steps(bound, start, starts, sizes)
        finally:
            set_grad_enabled(before)
        after = result[: len(state)]
        bound.check_dependencies(after, (*start, starts, sizes))
        tape = CompiledTape(start, starts, sizes, tuple(map(root_edge, after)))
        return tuple(part.detach() for part in result), tape

    def pull_back(
        self, bound: BoundFunction, tape: CompiledTape, adjoint: Sequence[torch.Tensor]
    ) -> tuple[Products, Products, list[tuple[float, float]]]:
        """Return the adjoint before the steps, their gradient with respect to parameters, and that to their times.

        The last has h dL/dh and dL/dt for each step, and is empty unless it was asked for.
        """
        starts, sizes = tape.starts, tape.sizes
        assert starts is not None
        assert sizes is not None
        bound.vjps += self._stages * len(sizes)
        times = (sizes, starts) if bound.needs_time_gradient else ()
        found = pull_back(bound, tape.roots, (*tape.start, *bound.parameters.tensors, *times), adjoint)
        parts, last = len(tape.start), len(found) - len(times)
        by_times: list[tuple[float, float]] = []
        if times:
            by_size, by_start = (
                torch.zeros_like(time) if part is None else part for part, time in zip(found[last:], times, strict=True)
            )
            by_times = list(zip((by_size * sizes).tolist(), by_start.tolist(), strict=True))
        return found[:parts], found[parts:last], by_times

    def _steps(self, bound: BoundFunction, state: Parts, starts: torch.Tensor, sizes: torch.Tensor) -> Parts:
        if len(starts) > 1 and self._loops:
            # One compilation serves all numbers of steps but one.
            mark_length_as_dynamic(starts)
            mark_length_as_dynamic(sizes)
        try:
            with traces_inner_derivatives():
                return self._run(state, starts, sizes, bound.args)
        except compiler_errors() as error:
            if not self.most:
                raise
            # Values that func reads have changed too often, or to what cannot be compiled.
            text = f"compile: steps are no longer compiled, because {_in_a_line(error)}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            self._run = self._one_by_one
            return self._run(state, starts, sizes, bound.args)

    def _one_by_one(self, state: Parts, starts: torch.Tensor, sizes: torch.Tensor, args: tuple[Any, ...]) -> Parts:
        for number in range(len(starts)):
            state = self._step(state, starts[number:], sizes[number:], args)
        return state


def _step(func: Function, layout: StateLayout, tableau: Tableau, attempts: bool) -> _Steps:
    """Return the first step of a segment as a function that torch can trace, see `step_loop`.

    With `attempts` it also returns f at all stages, also at those that the result does not depend on.
    """

    # Plain values, because torch's compiler cannot look into the locks of cached properties.
    is_tuple, shapes, device, dtype = layout.is_tuple, layout.shapes, layout.device, layout.compute_dtype
    state_device, state_dtype, result_terms = layout.vec_device, layout.state_dtype, tableau.result_terms
    stages = tuple(zip(tableau.c, tableau.counts, tableau.stage_terms, strict=True))

    def step(state: Parts, starts: torch.Tensor, sizes: torch.Tensor, args: tuple[Any, ...]) -> Parts:
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


def _mapped(step: _Steps, between: Callable[..., Parts], layout: StateLayout) -> _Steps:
    """Return the first step of a segment with the map after it."""
    device, dtype, state_device, state_dtype = layout.device, layout.dtype, layout.vec_device, layout.state_dtype

    def mapped(state: Parts, starts: torch.Tensor, sizes: torch.Tensor, args: tuple[Any, ...]) -> Parts:
        after = tuple([part.to(device, dtype) for part in step(state, starts, sizes, args)])
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
    bound: BoundFunction, layout: StateLayout, tableau: Scheme, state: Parts, start: float, size: float
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


def _one_evaluation(
    bound: BoundFunction, layout: StateLayout, tableau: Scheme, state: Parts, start: float, size: float
) -> None:
    """Evaluate f and the map at a copy of the state, uncompiled. Raises an error if one writes into its state."""
    with torch.inference_mode(False):
        inputs = layout.inputs(state, copy=True)
    versions = [part._version for part in inputs]
    bound.value(bound.func, layout, start, inputs)
    if [part._version for part in inputs] != versions:
        raise RuntimeError(STATE_WAS_WRITTEN)
    if bound.between is not None:
        bound.between_value(layout, start, tuple(part.to(layout.dtype) for part in inputs))


def _error_of(call: Callable[[], None], comm: MPI.Comm) -> str | None:
    """Compile what `call` runs. Returns why that is not possible on some rank, or None. Collective on `comm`."""
    try:
        if comm.size > 1:
            compile_in_turn(call, comm)
        else:
            call()
    except Exception as error:  # torch's compiler raises many kinds of them
        return _in_a_line(error)
    return None


def _in_a_line(error: Exception) -> str:
    """Return the line of an error of torch's compiler that says the most."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["without a message"]
    explained = [line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")]
    return f"torch.compile fails ({type(error).__name__}: {(explained or lines)[0]})"
