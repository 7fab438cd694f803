"""An attempt of an explicit step, stage by stage, so that its error can be estimated before it is accepted."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pnode_dist.ode.rhs.evaluation import StageGraph, StageState
from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.compiled_segment import CompiledTape
from pnode_dist.ode.steppers.explicit import ExplicitStepper
from pnode_dist.ode.steppers.explicit_step import OpenStep, Slopes, viewed
from pnode_dist.ode.steppers.graph_tape import CannotJoinError, OnGraph, closed, start_of_graph
from pnode_dist.ode.steppers.stage_tape import ByStage
from pnode_dist.ode.steppers.tape import Tape
from pnode_dist.system.torch_internals import set_grad_enabled


class First(NamedTuple):
    """f at the first stage of a step, evaluated before the attempt: by the last stage of the step before, or rejected.

    `start` is the state with the graph of `slope`, if the step will be on the tape as one graph. `stage` is the stage's
    own tape, if it will be there by stages.
    """

    slope: Parts
    start: Parts = ()
    stage: StageGraph | StageState | None = None


class Attempt:
    """A step of `stepper` from `time` by `size`, in progress. Collective on the stepper's communicator if f is.

    `end` is the time of the step after it, which can differ from `time + size` in the last bit. `records`: the tape is
    kept if the step is accepted. Raises `RuntimeError` and `CannotJoinError`, see `OnGraph`.
    """

    def __init__(
        self, stepper: ExplicitStepper, time: float, size: float, end: float, records: bool, first: First | None
    ) -> None:
        self._stepper, self._time, self._size, self._end = stepper, time, size, end
        self._joins = records and stepper.joins
        bound, layout, state = stepper.bound_function, stepper.layout, stepper.current.parts
        self._on_graph = OnGraph(bound, layout)
        self._by_stage = ByStage(bound, layout, "graph" if records and not self._joins else None)
        self._begin = bound.evaluations, bound.carried.mark() if self._joins else None
        self._next: Parts = ()
        if first is not None and records and not (first.start if self._joins else first.stage):
            first = None
        if self._joins:
            state = start_of_graph(state) if first is None else first.start
        self._start = state
        self._step = OpenStep(stepper.tableau, size, state)
        if first is not None:
            with torch.set_grad_enabled(self._joins):
                self._step.append(first.slope if self._joins else tuple(part.detach() for part in first.slope))
            if first.stage is not None:
                self._by_stage.stages.append(first.stage)

    @property
    def slopes(self) -> Slopes:
        """f at the stages so far."""
        return self._step.slopes

    @property
    def direction(self) -> float:
        """The sign of the step."""
        return math.copysign(1.0, self._size)

    @property
    def result(self) -> Parts:
        """The state after the step."""
        return self._step.result

    @property
    def is_complete(self) -> bool:
        """True if f was evaluated at all stages."""
        return len(self.slopes) == len(self._stepper.tableau.c)

    def again_by_stages(self) -> Attempt:
        """Return the same attempt with a tape by stages, after a `CannotJoinError`. Nothing of this one counts."""
        stepper = self._stepper
        bound, (evaluations, mark) = stepper.bound_function, self._begin
        bound.evaluations = evaluations
        bound.carried.restore(mark)
        stepper.stop_joining()
        return Attempt(stepper, self._time, self._size, self._end, True, None)

    def evaluate_next(self) -> Parts:
        """Evaluate f at the next stage, and return its value."""
        tableau, stage = self._stepper.tableau, len(self.slopes)
        time = self._time + tableau.c[stage] * self._size
        evaluate = self._on_graph if self._joins else self._by_stage
        before = torch.is_grad_enabled()
        # The context manager torch.enable_grad() takes as long as a small stage.
        set_grad_enabled(self._joins)
        try:
            if self._stepper.method.fsal and stage == len(tableau.c) - 1:
                # This is the first stage of the next step: its graph begins here.
                time, state = self._end, self._step.result
                self._next = state = start_of_graph(state) if self._joins else state
                state = viewed(state)
            else:
                state = self._step.next_state()
            self._step.append(evaluate(time, state))
        finally:
            set_grad_enabled(before)
        return self.slopes[-1]

    def first_again(self) -> First:
        """Return f at the first stage for another attempt from the same state."""
        stages = self._by_stage.stages
        return First(self.slopes[0], self._start if self._joins else (), stages[0] if stages else None)

    def accept(self, tape: Tape | None) -> First | None:
        """Make the result the current state, and extend `tape`. Returns f at its first stage, if known."""
        stepper, stages = self._stepper, self._by_stage.stages
        last = stages[-1] if stages else None
        counts = stepper.tableau.counts
        if self._joins:
            assert tape is not None
            needed = [slope for slope, counted in zip(self.slopes, counts, strict=True) if counted]
            vjps = sum(any(part.requires_grad for part in slope) for slope in needed)
            after, graph = closed(stepper.bound_function, self._start, self._step.result, vjps)
            tape.append(graph)
        else:
            after = self._step.result
            if tape is not None:
                tape += [stage for stage, counted in zip(stages, counts, strict=True) if counted]
        stepper.current.replace(after, shared=tape is not None)
        return First(self.slopes[-1], self._next, last) if stepper.method.fsal else None


class CompiledAttempt:
    """An attempt like `Attempt` whose stages are one compiled function."""

    def __init__(self, stepper: ExplicitStepper, time: float, size: float, records: bool, first: First | None) -> None:
        self._stepper, self._records = stepper, records
        self._segment = Segment(0, (time,), (size,))
        self._found: tuple[Parts, list[Parts], CompiledTape | None] | None = None
        # The compiled step evaluates this stage again, but the error estimate counts it as given.
        self.slopes: Slopes = [] if first is None else [first.slope]

    @property
    def direction(self) -> float:
        """The sign of the step."""
        return math.copysign(1.0, self._segment.sizes[0])

    @property
    def result(self) -> Parts:
        """The state after the step."""
        return self._step[0]

    @property
    def is_complete(self) -> bool:
        """True if f is known at all stages."""
        return len(self.slopes) == len(self._stepper.tableau.c)

    @property
    def _step(self) -> tuple[Parts, list[Parts], CompiledTape | None]:
        stepper, compiled = self._stepper, self._stepper.compiled
        if self._found is None:
            assert compiled is not None
            self._found = compiled.attempt(stepper.bound_function, self._segment, stepper.current.parts, self._records)
        return self._found

    def evaluate_next(self) -> Parts:
        """Return f at the next stage."""
        self.slopes.append(self._step[1][len(self.slopes)])
        return self.slopes[-1]

    def first_again(self) -> First:
        """Return f at the first stage for another attempt from the same state."""
        return First(self.slopes[0])

    def accept(self, tape: Tape | None) -> First | None:
        """Make the result the current state, and extend `tape`. Returns f at its first stage, if known."""
        stepper, (after, slopes, recorded) = self._stepper, self._step
        if tape is not None:
            assert recorded is not None
            tape.append(recorded)
        stepper.current.replace(after, shared=tape is not None)
        return First(slopes[-1]) if stepper.method.fsal else None


def attempted(
    stepper: ExplicitStepper, time: float, size: float, end: float, records: bool, first: First | None
) -> Attempt | CompiledAttempt:
    """Begin an attempt, see `Attempt`: compiled if the steps of the solve are."""
    if stepper.runs_compiled(Segment(0, (time,), (end - time,))):
        return CompiledAttempt(stepper, time, size, records, first)
    return Attempt(stepper, time, size, end, records, first)


def complete(attempt: Attempt | CompiledAttempt) -> Attempt | CompiledAttempt:
    """Evaluate f at all stages. Returns the attempt, or the one by stages if its tape cannot be one graph."""
    try:
        while not attempt.is_complete:
            attempt.evaluate_next()
    except CannotJoinError:
        assert isinstance(attempt, Attempt)
        return complete(attempt.again_by_stages())
    return attempt
