"""Segments of steps as one compiled function, forward and backward.

torch.compile traces the loop over the steps, with the stages and f inside it. Its guards and the Python code of a call
are then paid once a segment. The code does not grow with the number of steps where torch compiles the loop itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from mpi4py import MPI
from torch.autograd.graph import GradientEdge

from pnode_dist.ode.rhs.compiled import Compiler
from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.products import pull_back
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.adjoint_sums import Products
from pnode_dist.ode.steppers.step_loop import Backend, looping, repeating
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

Turns = tuple[torch.Tensor, ...]
"""Tensors with one entry for each step of a segment. The first two are the starts and sizes of the steps."""
Step = Callable[[Parts, Turns, tuple[Any, ...]], Parts]
"""A step that torch can trace, see `step_loop`, as a function of the state, its turns and f's extra arguments."""


@dataclass(frozen=True)
class TracedStep:
    """A step to compile, of which a segment has several.

    `evaluations` and `vjps` are the numbers of those of f in a step and in its adjoint. `turns` makes the turns of a
    segment, and `constants` come before f's extra arguments. `maps`: the step ends with the map between steps.
    `always_with_tape`: without a tape the same code runs, and its graph is dropped.

    `refusal` tells why the step cannot be compiled, given the right-hand side, a state, and the start and size of a
    step; None if nothing is known against it. It is collective if f is, and raises `RuntimeError` if f writes into its
    state.
    """

    run: Step
    evaluations: int
    vjps: int
    refusal: Callable[[BoundFunction, Parts, float, float], str | None]
    turns: Callable[[Segment], Turns] = Segment.tensors
    maps: bool = False
    always_with_tape: bool = False
    constants: tuple[Any, ...] = ()


class CompiledTape(NamedTuple):
    """The graph of a segment: its inputs, which are the state before it and the turns of its steps, and its roots.

    Without roots the graph is made when it is needed.
    """

    start: Parts
    turns: Turns = ()
    roots: tuple[GradientEdge, ...] = ()


class CompiledSegments:
    """The compiled segments of one step, for solves with or without a gradient.

    With `attempts` they have one step each, whose further results are known too, so that its error can be estimated.
    `maps`: the steps end with the map between steps.
    `most` is the largest number of steps of a segment. It is 0 if the right-hand side cannot be compiled, None before
    the first call of `prepare`.
    """

    def __init__(
        self, compiler: Compiler, step: TracedStep, device: torch.device, records: bool, attempts: bool = False
    ) -> None:
        self._step, self._records, self.attempts = step, records, attempts
        self.maps = step.maps
        self._compile = partial(compiler.compile, step.run, device)
        self._loops, self._run = False, step.run
        self.most: int | None = None

    def prepare(self, comm: MPI.Comm, bound: BoundFunction, state: Parts, start: float, size: float) -> int:
        """Compile, and return the largest number of steps of a segment, 0 if that is not possible, with a warning.

        Takes steps from `state` at `start` by `size`. Changes nothing that f carries from one evaluation to the next.
        Collective on `comm`, that of the solver: all of its ranks get the same number.
        """
        if comm.allreduce(self.most is None, MPI.LOR):
            counts = bound.counts()
            with bound.carried.aside():
                reason = self._step.refusal(bound, state, start, size)
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
        return self.run(bound, state, self._step.turns(segment))[: len(state)]

    def record(self, bound: BoundFunction, segment: Segment, state: Parts) -> tuple[Parts, CompiledTape]:
        """Return the state after the steps, and their tape."""
        found, tape = self.run_with_tape(bound, state, self._step.turns(segment))
        return found[: len(state)], tape

    def attempt(
        self, bound: BoundFunction, segment: Segment, state: Parts, records: bool
    ) -> tuple[Parts, list[Parts], CompiledTape | None]:
        """Return the state after the only step, f at all of its stages, and its tape if it `records`."""
        turns = self._step.turns(segment)
        found, tape = self.run_with_tape(bound, state, turns) if records else (self.run(bound, state, turns), None)
        parts = len(state)
        slopes = [found[first : first + parts] for first in range(parts, len(found), parts)]
        return found[:parts], slopes, tape

    def run(self, bound: BoundFunction, state: Parts, turns: Turns) -> Parts:
        """Return the state after the steps, and the further results of all steps."""
        if self._step.always_with_tape and not torch.is_inference_mode_enabled():
            return self.run_with_tape(bound, state, turns)[0]
        bound.evaluations += self._step.evaluations * len(turns[0])
        with torch.no_grad():
            return self._steps(bound, state, turns)

    def run_with_tape(self, bound: BoundFunction, state: Parts, turns: Turns) -> tuple[Parts, CompiledTape]:
        """Return what `run` returns, and the tape of the steps."""
        bound.evaluations += self._step.evaluations * len(turns[0])
        times = turns[:2]
        if bound.needs_time_gradient:
            for time in times:
                time.requires_grad_()
        start = tuple(part.detach().requires_grad_() for part in state)
        before = torch.is_grad_enabled()
        set_grad_enabled(True)
        try:
            result = self._steps(bound, start, turns)
        finally:
            set_grad_enabled(before)
        after = result[: len(state)]
        bound.check_dependencies(after, (*start, *times))
        tape = CompiledTape(start, turns, tuple(map(root_edge, after)))
        return tuple(part.detach() for part in result), tape

    def pull_back(
        self, bound: BoundFunction, tape: CompiledTape, adjoint: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], Products, list[tuple[float, float]]]:
        """Return the adjoint before the steps, their gradient with respect to parameters, and that to their times.

        The last has h dL/dh and dL/dt for each step, and is empty unless it was asked for.
        """
        starts, sizes = tape.turns[:2]
        bound.vjps += self._step.vjps * len(sizes)
        times = (sizes, starts) if bound.needs_time_gradient else ()
        found = pull_back(bound, tape.roots, (*tape.start, *bound.parameters.tensors, *times), adjoint)
        parts, last = len(tape.start), len(found) - len(times)
        by_times: list[tuple[float, float]] = []
        if times:
            by_size, by_start = (
                torch.zeros_like(time) if part is None else part for part, time in zip(found[last:], times, strict=True)
            )
            by_times = list(zip((by_size * sizes).tolist(), by_start.tolist(), strict=True))
        before = [
            torch.zeros_like(old) if new is None else new for old, new in zip(adjoint, found[:parts], strict=True)
        ]
        return before, found[parts:last], by_times

    def _steps(self, bound: BoundFunction, state: Parts, turns: Turns) -> Parts:
        if len(turns[0]) > 1 and self._loops:
            # One compilation serves all numbers of steps but one.
            for turn in turns:
                mark_length_as_dynamic(turn)
        args = (*self._step.constants, *bound.args)
        try:
            with traces_inner_derivatives():
                return self._run(state, turns, args)
        except compiler_errors() as error:
            if not self.most:
                raise
            # Values that func reads have changed too often, or to what cannot be compiled.
            text = f"compile: steps are no longer compiled, because {_in_a_line(error)}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            self._run = self._step.run if self.attempts else self._one_by_one
            return self._run(state, turns, args)

    def _one_by_one(self, state: Parts, turns: Turns, args: tuple[Any, ...]) -> Parts:
        further = []
        for number in range(len(turns[0])):
            results = self._step.run(state, tuple(turn[number:] for turn in turns), args)
            further.append(results[len(state) :])
            state = results[: len(state)]
        return (*state, *[torch.stack(values) for values in zip(*further, strict=True)])


def between_jumps(bound: BoundFunction, layout: StateLayout, segment: Segment) -> bool:
    """Return True if compiled code may take these steps: it evaluates f at jumps too, on no certain side."""
    interval, dtype = bound.smooth_interval, layout.compute_dtype
    end = segment.starts[-1] + segment.sizes[-1]
    return interval is None or (interval.holds(segment.starts[0], dtype) and interval.holds(end, dtype))


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
