"""Steps whose size follows from an estimate of their error, by PETSc's adaptors (TSAdapt).

Which steps are accepted is all that the adjoint needs to know of this: they are replayed with the very same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError, StepSizeError
from pnode_dist.ode.evaluation import Recording
from pnode_dist.ode.explicit import ExplicitStepper
from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.stepper import END_OF_TIME, MOST_STEPS, PetscOptions, options_database
from pnode_dist.ode.tolerances import ErrorControl, Tolerances

_MOST_REJECTIONS = 100
_NOT_A_NUMBER = 72  # PETSC_ERR_FP
_SMALLEST_RATIO = 8 * np.finfo(np.float64).eps


class AdaptiveStepper(Protocol):
    """Attempts of steps with error control. Collective on the stepper's communicator."""

    def begin(self, control: ErrorControl) -> None:
        """Start a solve with the tolerances of `control`. Raises `ConfigurationError` if their shape is wrong."""
        ...

    def end(self) -> None:
        """End a solve."""
        ...

    def attempt(
        self, number: int, time: float, size: float, end: float, recording: Recording | None
    ) -> tuple[bool, float]:
        """Try a step from `time` by `size`: whether it was accepted, and the size that PETSc proposes to go on with.

        `end` is where the next step would start, `time + size` or an output time that differs in the last bit.
        A step that is not accepted leaves the state as it was; not a number is proposed where no size can be. With
        `recording`, the graphs of the stages that an adjoint needs go there. Collective on the communicator.
        """
        ...

    def first_size(self, time: float, span: float) -> float:
        """A size to begin with, for a solve that goes on for `span`. Collective on the communicator."""
        ...


class ExplicitAttempts:
    """Attempts of explicit steps with error control, on the state of `stepper`. Collective on its communicator.

    Raises `ConfigurationError` for a method without an error estimate.
    """

    def __init__(self, stepper: ExplicitStepper, adaptor: str, options: PetscOptions) -> None:
        method = stepper.method
        if not method.estimates_error:
            able = ", ".join(name for name, other in METHODS.items() if other.estimates_error and other.family == "rk")
            raise ConfigurationError(
                f"method = {method.name!r}: has no error estimate to adapt steps to (rtol, atol): must be one of {able}"
            )
        self._stepper = stepper
        self._before = stepper.state.clone()
        self._tolerances = Tolerances(stepper)
        self.first_size = self._tolerances.first_size
        self._fresh, self._rejected = True, False
        self._first_graph: Any = None
        self._options = {**options, "ts_adapt_type": adaptor, "ts_rk_type": method.petsc_name}
        self._ts = self._create_ts()

    def _create_ts(self) -> PETSc.TS:
        stepper = self._stepper
        ts = PETSc.TS().create(comm=stepper.comm)
        ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
        ts.setType(PETSc.TS.Type.RK)
        ts.setRKType(stepper.method.petsc_name)
        ts.setRHSFunction(stepper.rhs.attempt, stepper.solution.duplicate())
        ts.setSolution(stepper.solution)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
        with options_database(self._options):
            ts.setFromOptions()
        # PETSc tries again by itself after undoing the step in floating point. That is not the state before it.
        ts.setMaxStepRejections(0)
        ts.setErrorIfStepFails(False)
        ts.setMaxSteps(MOST_STEPS)
        ts.setMaxTime(END_OF_TIME)
        return ts

    def begin(self, control: ErrorControl) -> None:
        """See `AdaptiveStepper.begin`."""
        self._fresh, self._rejected, self._first_graph = True, False, None
        self._tolerances.take(control, self._ts)

    def end(self) -> None:
        """End a solve: the evaluation that a next step would have begun with is not kept alive from here."""
        self._first_graph = None

    def attempt(
        self, number: int, time: float, size: float, end: float, recording: Recording | None
    ) -> tuple[bool, float]:
        """See `AdaptiveStepper.attempt`."""
        stepper, ts, rhs = self._stepper, self._ts, self._stepper.rhs
        method = stepper.method
        direction = rhs.direction = math.copysign(1.0, size)
        chained = method.fsal and not self._fresh and not self._rejected
        stages: Recording = [None] * method.stages
        # PETSc's time of the last stage can differ from the next step's in the last bit, and so could f.
        fsal_time = direction * end if method.fsal else None
        rhs.start_attempt(stages if recording is not None else None, int(chained), self._rejected, fsal_time)
        self._before.copy_(stepper.state)
        ts.setTime(direction * time)
        ts.setTimeStep(direction * size)
        ts.setStepNumber(number)
        if self._fresh or (self._rejected and method.fsal):
            ts.restartStep()
        try:
            with stepper.errors_of_func():
                ts.step()
        except PETSc.Error as error:
            if error.ierr != _NOT_A_NUMBER:
                raise
            # All ranks get here: it is the norm of the error over all of them. The TS is spoilt, the state is not.
            stepper.failed = False
            stepper.state.copy_(self._before)
            stepper.touched()
            self._ts.destroy()
            rhs.forget_views()
            self._ts = self._create_ts()
            self._tolerances.give(self._ts)
            self._fresh, self._rejected = True, False
            return False, math.nan
        self._fresh = False
        if chained or self._rejected:
            stages[0] = self._first_graph
        accepted = ts.getConvergedReason() != PETSc.TS.ConvergedReason.DIVERGED_STEP_REJECTED
        proposed = direction * ts.getTimeStep()
        if not accepted:
            ts.setConvergedReason(PETSc.TS.ConvergedReason.ITERATING)
            stepper.state.copy_(self._before)
            stepper.touched()
            self._rejected, self._first_graph = True, stages[0]
            return False, proposed
        self._rejected, self._first_graph = False, stages[-1] if method.fsal else None
        if method.fsal:
            stepper.state.copy_(rhs.last_stage)
            stepper.touched()
        if recording is not None:
            # What the last stage of other methods adds is zero, or is needed.
            recording += stages[:-1] if method.fsal else stages
            if not method.fsal and not method.last_stage_weighs:
                recording[-1] = None
        return True, proposed


@dataclass(frozen=True)
class AcceptedStep:
    """Step `number` from `start` by `size`; `output` is the number of the output time that it ends at, if any."""

    number: int
    start: float
    size: float
    output: int | None
    recording: Recording | None


def integrate(
    adaptive: AdaptiveStepper,
    times: tuple[float, ...],
    control: ErrorControl,
    before: Callable[[int, float], bool],
    after: Callable[[AcceptedStep], None],
) -> int:
    """Step through `times`, landing on each of them; returns how many attempts were rejected. Collective.

    `before(number, time)` is called ahead of each step and says whether to record it, `after` when it is accepted.
    Raises `StepSizeError` when steps become too small for the time to change.
    """
    adaptive.begin(control)
    time, number, rejected = times[0], 0, 0
    try:
        wanted = control.first_size or adaptive.first_size(time, times[1] - time)
        for output, target in enumerate(times[1:], start=1):
            while time != target:
                recording: Recording | None = [] if before(number, time) else None
                size, wanted, rejections = _accepted(adaptive, number, time, target, wanted, recording)
                lands = size == target - time
                after(AcceptedStep(number, time, size, output if lands else None, recording))
                time = target if lands else time + size
                number += 1
                rejected += rejections
    finally:
        adaptive.end()
    return rejected


def _accepted(
    adaptive: AdaptiveStepper, number: int, time: float, target: float, wanted: float, recording: Recording | None
) -> tuple[float, float, int]:
    """Attempt step `number` until it is accepted: its size, the size wanted for the next, and the rejections."""
    size = _fitted(wanted, target - time)
    for rejections in range(_MOST_REJECTIONS):
        lands = size == target - time
        accepted, proposed = adaptive.attempt(number, time, size, target if lands else time + size, recording)
        if accepted:
            # A step that was cut to land on an output time says little about the next.
            cut = lands and abs(proposed) >= abs(size)
            return size, max(abs(proposed), wanted) if cut else abs(proposed), rejections
        wanted = 0.0
        # Where f is not a number there is no estimate either.
        size = proposed if math.isfinite(proposed) and abs(proposed) < abs(size) else size / 4
        if abs(size) <= _SMALLEST_RATIO * abs(time):
            break
    raise StepSizeError(
        f"step {number} at t = {time:.6g}: its size fell to {abs(size):.3g} without the error estimate meeting rtol "
        "and atol: the problem may be stiff, discontinuous or infinite there"
    )


def _fitted(wanted: float, remaining: float) -> float:
    """The size of the next step towards a time that far away. It lands there if it can; two steps are made equal."""
    if wanted >= abs(remaining) * (1 - 1e-10):
        return remaining
    if 2 * wanted > abs(remaining):
        return remaining / 2
    return math.copysign(wanted, remaining)
