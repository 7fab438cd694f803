"""Explicit steps with error control: their size follows from an error estimate, by PETSc's adaptors (TSAdapt).

The adjoint needs only the starts and sizes of the accepted steps. Recomputed steps have the same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError, StepSizeError
from pnode_dist.ode.given_options import check_read, read_at_set_up
from pnode_dist.ode.jumps import SmoothInterval
from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.recomputation.carried import Carried
from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.steppers.attempt import Attempt, CompiledAttempt, First, attempted
from pnode_dist.ode.steppers.base import END_OF_TIME, MOST_STEPS, PetscOptions, Stepper, options_database
from pnode_dist.ode.steppers.error_estimate import largest_component, tolerated
from pnode_dist.ode.steppers.explicit import ExplicitStepper
from pnode_dist.ode.steppers.graph_tape import CannotJoinError
from pnode_dist.ode.steppers.tape import Tape
from pnode_dist.ode.steppers.tolerances import ErrorControl, StepLimits, Tolerances
from pnode_dist.ode.time_grid import Stop
from pnode_dist.petsc import unwinding, vectors

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

    def destroy(self) -> None:
        """Destroy every PETSc object made for the attempts, not the stepper's. Collective on its communicator."""
        ...

    def attempt(self, number: int, time: float, size: float, end: float, tape: Tape | None) -> tuple[bool, float]:
        """Attempt a step from `time` by `size`. Returns True if it was accepted, and the size that PETSc proposes next.

        `end` is the start of the next step: `time + size`, or an output time that differs in the last bit. A rejected
        step leaves the state unchanged. The proposed size is NaN if PETSc has none. The graphs of the stages are
        appended to `tape`, if given. Collective on the communicator.
        """
        ...

    def state_changed(self, before: Parts) -> None:
        """Note that the state after an accepted step, `before`, was replaced by the present one."""
        ...

    def first_size(self, time: float, span: float) -> float:
        """Choose the size of the first step, for a solve of length `span`. Collective on the communicator."""
        ...

    def rejection(self) -> str:
        """Describe the error of the last attempt, which was rejected. Collective on the communicator."""
        ...


class _Stages:
    """The RHSFunction of an attempt. Holds no reference to the TS, whose own references could not be collected.

    The attempt forms the states of the stages, as in a recomputed step, because PETSc's sums differ in the last bit.
    PETSc gets f at these states for its error estimate.
    """

    def __init__(self, stepper: ExplicitStepper) -> None:
        self._stepper = stepper
        self._views: dict[int, Parts] = {}
        self.attempt: Attempt | CompiledAttempt | None = None

    def start(self, attempt: Attempt | CompiledAttempt, asks_again: bool) -> None:
        """Begin an attempt. `asks_again`: PETSc calls the function for a first stage whose value it has."""
        self.attempt, self._asks_again = attempt, asks_again

    def function(self, ts: PETSc.TS, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        """RHSFunction."""
        stepper, attempt = self._stepper, self.attempt
        assert attempt is not None
        # PETSc turns an exception into an error code. The stepper raises the exception stored here instead.
        try:
            if self._asks_again:
                self._asks_again = False
                return  # The Vec still holds the value.
            slopes = attempt.evaluate_next()
            device = stepper.layout.vec_device
            for view, slope in zip(self._of(f), slopes, strict=True):
                torch.mul(slope.detach(), attempt.direction, out=view)
            vectors.wrote(f, device)
        except BaseException as error:
            stepper.error = unwinding.begin(error)
            raise

    def end(self) -> None:
        """End the attempts, and drop all references to the last one."""
        self.attempt = None

    def forget_views(self) -> None:
        """Drop the views of all Vecs: after a TS is destroyed, PETSc may reuse their handles."""
        self._views.clear()

    def _of(self, vec: PETSc.Vec) -> Parts:
        layout, handle = self._stepper.layout, vec.handle
        parts = self._views.get(handle)
        if parts is None:
            parts = layout.parts(vectors.view(vec, (layout.size,), layout.vec_device))
            # On a device ask PETSc each time, because it may have newer values in the host's memory.
            if layout.vec_device is vectors.HOST:
                self._views[handle] = parts
        return parts


class ExplicitAttempts:
    """Attempts of explicit steps with error control, on the state of `stepper`. Collective on its communicator.

    Raises `ConfigurationError` for a method without an error estimate.
    """

    def __init__(self, stepper: Stepper, adaptor: str, options: PetscOptions) -> None:
        method = stepper.method
        if not method.estimates_error:
            able = ", ".join(name for name, other in METHODS.items() if other.estimates_error and other.family == "rk")
            raise ConfigurationError(
                f"method = {method.name!r}: has no error estimate to adapt steps to (rtol, atol): must be one of {able}"
            )
        assert isinstance(stepper, ExplicitStepper)
        self._stepper = stepper
        self._stages = _Stages(stepper)
        self._solution = vectors.create_vec(stepper.comm, stepper.layout.size, stepper.layout.vec_device)
        self._tolerances = Tolerances(stepper)
        self.first_size = self._tolerances.first_size
        self._fresh, self._rejected = True, False
        self._first: First | None = None
        self._last: tuple[float, Attempt | CompiledAttempt] | None = None
        self._options = {**options, "ts_adapt_type": adaptor, "ts_rk_type": method.petsc_name}
        self._unread = set(options) - read_at_set_up(options)
        self._ts = self._create_ts()
        check_read(self._unread)

    def _create_ts(self) -> PETSc.TS:
        stepper = self._stepper
        ts = PETSc.TS().create(comm=stepper.comm)
        ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
        ts.setType(PETSc.TS.Type.RK)
        ts.setRKType(stepper.method.petsc_name)
        ts.setRHSFunction(self._stages.function, self._solution.duplicate())
        ts.setSolution(self._solution)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
        with options_database(self._options, self._unread):
            ts.setFromOptions()
        # PETSc's own retry undoes the step in floating point, and does not restore the state before it exactly.
        ts.setMaxStepRejections(0)
        ts.setErrorIfStepFails(False)
        ts.setMaxSteps(MOST_STEPS)
        ts.setMaxTime(END_OF_TIME)
        return ts

    def begin(self, control: ErrorControl) -> None:
        """See `AdaptiveStepper.begin`."""
        self._fresh, self._rejected, self._first = True, False, None
        self._tolerances.take(control, self._ts)

    def end(self) -> None:
        """End a solve, and drop the evaluations that are kept for the next step."""
        self._first = self._last = None
        self._stages.end()

    def destroy(self) -> None:
        """See `AdaptiveStepper.destroy`."""
        self._stages.forget_views()
        self._ts.destroy()
        self._solution.destroy()
        self._tolerances.destroy()

    def attempt(self, number: int, time: float, size: float, end: float, tape: Tape | None) -> tuple[bool, float]:
        """See `AdaptiveStepper.attempt`."""
        stepper, ts = self._stepper, self._ts
        self._last = None
        # PETSc's time of the last stage can differ from the next step's in the last bit, and so could f.
        attempt = attempted(stepper, time, size, end, tape is not None, self._first)
        self._stages.start(attempt, self._rejected)
        vectors.fill(self._solution, stepper.current.flat, stepper.layout.vec_device)
        ts.setTime(attempt.direction * time)
        ts.setTimeStep(attempt.direction * size)
        ts.setStepNumber(number)
        # Between compiled and other steps the last slope is evaluated anew, because its tape is of the other kind.
        if self._fresh or (stepper.method.fsal and (self._rejected or not attempt.slopes)):
            ts.restartStep()
        try:
            with torch.no_grad(), stepper.errors_of_func():
                ts.step()
        except CannotJoinError:
            self._replace_ts()
            assert isinstance(attempt, Attempt)
            attempt.again_by_stages()
            return self.attempt(number, time, size, end, tape)
        except PETSc.Error as error:
            if error.ierr != _NOT_A_NUMBER:
                raise
            # The norm of the error is NaN on all ranks alike. The state is unchanged.
            self._replace_ts()
            self._last = size, attempt
            return False, math.nan
        self._stages.end()
        self._fresh = False
        accepted = ts.getConvergedReason() != PETSc.TS.ConvergedReason.DIVERGED_STEP_REJECTED
        proposed = attempt.direction * ts.getTimeStep()
        self._rejected = not accepted
        if not accepted:
            self._last = size, attempt
            ts.setConvergedReason(PETSc.TS.ConvergedReason.ITERATING)
        self._first = attempt.accept(tape) if accepted else attempt.first_again()
        return accepted, proposed

    def state_changed(self, before: Parts) -> None:
        """See `AdaptiveStepper.state_changed`: f at the last stage is not that at the first one of the next step."""
        self._first = None

    def rejection(self) -> str:
        """See `AdaptiveStepper.rejection`."""
        assert self._last is not None
        stepper, (size, attempt) = self._stepper, self._last
        if not attempt.is_complete:
            return "the error is not a number"
        with torch.no_grad():
            scales = tolerated(stepper.current.parts, attempt.result, *self._tolerances.of_parts())
            return largest_component(
                stepper.comm, stepper.tableau, size, attempt.slopes, scales, stepper.layout.is_tuple
            )

    def _replace_ts(self) -> None:
        """Make a new TS, because the present one cannot be used after an error in its step."""
        self._stepper.failed = False
        self._ts.destroy()
        self._stages.forget_views()
        self._ts = self._create_ts()
        self._tolerances.give(self._ts)
        self._fresh, self._rejected, self._first = True, False, None


@dataclass(frozen=True)
class AcceptedStep:
    """Step `number` from `start` by `size`. `stop` is the output time or the jump that it ends at, or None."""

    number: int
    start: float
    size: float
    stop: Stop | None
    tape: Tape | None


def integrate(
    adaptive: AdaptiveStepper,
    stops: Sequence[Stop],
    control: ErrorControl,
    before: Callable[[int, float], bool],
    after: Callable[[AcceptedStep], None],
    carried: Carried,
    enter: Callable[[SmoothInterval | None], None],
) -> int:
    """Step through `stops`, and end a step at each of them. Returns the number of rejected attempts. Collective.

    The control starts anew at each jump. `before(number, time)` is called before each step, and returns True to record
    its tape. `after` is called after each accepted step, and `enter` before the first step of each interval between
    jumps. Raises `StepSizeError` if a step becomes too small to change the time or smaller than `dt_min`, and for
    more attempts than `max_steps`, or between two outputs than a step rule allows.
    """
    time, number, rejected, wanted, limits = stops[0].time, 0, 0, math.nan, control.limits
    try:
        for last, stop in pairwise(stops):
            attempts, target = 0, stop.time
            if last.is_jump or number == 0:
                enter(last.after)
                adaptive.begin(control)
                with carried.aside():
                    wanted = limits.within(control.first_size or adaptive.first_size(time, target - time))
            while time != target:
                if control.rule is not None and attempts >= control.rule.max_num_steps:
                    raise StepSizeError(
                        f"max_num_steps = {control.rule.max_num_steps}: more steps between two output times are needed "
                        f"at t = {time:.6g}"
                    )
                tape: Tape | None = [] if before(number, time) else None
                size, wanted, rejections = _accepted(
                    adaptive, limits, StepStart(number, rejected, time, target), wanted, tape
                )
                lands = size == target - time
                after(AcceptedStep(number, time, size, stop if lands else None, tape))
                time = target if lands else time + size
                number += 1
                rejected += rejections
                attempts += 1 + rejections
    finally:
        adaptive.end()
    return rejected


@dataclass(frozen=True)
class StepStart:
    """Step `number` from `time` towards the output time `target`, after so many `rejected` attempts of all steps."""

    number: int
    rejected: int
    time: float
    target: float

    def failed(self, size: float, reason: str) -> StepSizeError:
        """Return the error of an attempt of this `size`."""
        return StepSizeError(f"step {self.number} at t = {self.time:.6g}: its size fell to {abs(size):.3g} {reason}")


def _accepted(
    adaptive: AdaptiveStepper, limits: StepLimits, start: StepStart, wanted: float, tape: Tape | None
) -> tuple[float, float, int]:
    """Attempt a step until it is accepted. Returns its size, the next size, and the number of rejections."""
    time, target = start.time, start.target
    size = _fitted(wanted, target - time)
    for rejections in range(_MOST_REJECTIONS):
        done = start.number + start.rejected + rejections
        if limits.max_steps is not None and done >= limits.max_steps:
            raise StepSizeError(
                f"max_steps = {limits.max_steps}: more steps are needed at t = {time:.6g}, where the next one has the "
                f"size {abs(size):.3g}; {start.rejected + rejections} of {done} were rejected"
            )
        lands = size == target - time
        accepted, proposed = adaptive.attempt(start.number, time, size, target if lands else time + size, tape)
        if accepted:
            # A step that was shortened to end at an output time does not limit the next one.
            cut = lands and abs(proposed) >= abs(size)
            return size, limits.within(max(abs(proposed), wanted) if cut else abs(proposed)), rejections
        wanted = 0.0
        if abs(size) <= limits.dt_min:
            raise start.failed(size, f"and dt_min = {limits.dt_min!r} allows no smaller one: {adaptive.rejection()}")
        # If f is NaN there is no estimate either.
        size = proposed if math.isfinite(proposed) and abs(proposed) < abs(size) else size / 4
        size = math.copysign(max(abs(size), limits.dt_min), size)
        if abs(size) <= _SMALLEST_RATIO * abs(time):
            break
    raise start.failed(
        size,
        f"without the error estimate meeting rtol and atol ({adaptive.rejection()}): the problem may be stiff, "
        "discontinuous or infinite there",
    )


def _fitted(wanted: float, remaining: float) -> float:
    """Return the size of the next step. It ends at the target if it can; the last two steps are equal."""
    if wanted >= abs(remaining) * (1 - 1e-10):
        return remaining
    if 2 * wanted > abs(remaining):
        return remaining / 2
    return math.copysign(wanted, remaining)
