"""Steps whose size follows from an estimate of their error, by PETSc's adaptors (TSAdapt).

Which steps are accepted is all that the adjoint needs to know of this: they are replayed with the very same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError, StepSizeError
from pnode_dist.ode.given_options import check_read, read_at_set_up
from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.recomputation.carried import Carried
from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.steppers.base import END_OF_TIME, MOST_STEPS, PetscOptions, Stepper, options_database
from pnode_dist.ode.steppers.explicit import ExplicitStepper, Slopes
from pnode_dist.ode.steppers.tape import Tape
from pnode_dist.ode.steppers.tolerances import ErrorControl, Tolerances
from pnode_dist.petsc import vectors

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
        """Try a step from `time` by `size`: whether it was accepted, and the size that PETSc proposes to go on with.

        `end` is where the next step would start, `time + size` or an output time that differs in the last bit.
        A step that is not accepted leaves the state as it was; not a number is proposed where no size can be. With
        `tape`, the graphs of the stages that an adjoint needs go there. Collective on the communicator.
        """
        ...

    def first_size(self, time: float, span: float) -> float:
        """A size to begin with, for a solve that goes on for `span`. Collective on the communicator."""
        ...


class _Stages:
    """f as PETSc asks for it in an attempt. Holds no reference to the TS: PETSc's own could not be collected.

    The states of the stages are formed by the stepper, as those of a step that is run again are: PETSc's own sums
    differ in the last bit. It is given f there, for its estimate of the error. `slopes` are those of the attempt.
    """

    def __init__(self, stepper: ExplicitStepper) -> None:
        self._stepper = stepper
        self._views: dict[int, Parts] = {}
        self.slopes: Slopes = []

    def start(
        self,
        time: float,
        size: float,
        last_time: float,
        tape: Tape | None,
        first: tuple[Parts, Any] | None,
        asks_again: bool,
    ) -> None:
        """Say that a step is attempted, with its last stage at `last_time` if the method is FSAL.

        `first` is f at the first stage, and what is recorded of it, where an attempt before has evaluated it.
        `asks_again`: PETSc asks for it all the same.
        """
        self._time, self._size, self._last_time, self._recording = time, size, last_time, tape
        self._asks_again = asks_again
        self.slopes = []
        if first is not None:
            slopes, graph = first
            self.slopes.append(slopes)
            if tape is not None:
                tape.append(graph)

    def function(self, ts: PETSc.TS, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        """RHSFunction."""
        stepper = self._stepper
        # PETSc turns an exception into an error code; the stepper raises the one kept here instead.
        try:
            if self._asks_again:
                self._asks_again = False
                return  # The Vec still holds it.
            stage = len(self.slopes)
            tableau = stepper.tableau
            fsal_stage = stepper.method.fsal and stage == len(tableau.c) - 1
            time = self._last_time if fsal_stage else self._time + tableau.c[stage] * self._size
            state = stepper.stage_state(stage, self._size, self.slopes, self._recording is not None)
            slopes = stepper.slope(time, state, self._recording, "graph")
            self.slopes.append(slopes)
            device = stepper.layout.vec_device
            for view, slope in zip(self._of(f), slopes, strict=True):
                torch.mul(slope, math.copysign(1.0, self._size), out=view)
            vectors.wrote(f, device)
        except BaseException as error:
            stepper.error = error
            raise

    def end(self) -> None:
        """Say that the attempts are over: nothing of the last is kept alive from here."""
        self.slopes, self._recording = [], None

    def forget_views(self) -> None:
        """Forget all Vecs: those of a TS that has been destroyed may have come back as others."""
        self._views.clear()

    def _of(self, vec: PETSc.Vec) -> Parts:
        layout, handle = self._stepper.layout, vec.handle
        parts = self._views.get(handle)
        if parts is None:
            parts = layout.parts(vectors.view(vec, (layout.size,), layout.vec_device))
            # On a device PETSc has to be asked each time, because it may have newer values in the host's memory.
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
        self._first: tuple[Parts, Any] | None = None
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
        # PETSc tries again by itself after undoing the step in floating point. That is not the state before it.
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
        """End a solve: the evaluation that a next step would have begun with is not kept alive from here."""
        self._first = None
        self._stages.end()

    def destroy(self) -> None:
        """See `AdaptiveStepper.destroy`."""
        self._stages.forget_views()
        self._ts.destroy()
        self._solution.destroy()
        self._tolerances.destroy()

    def attempt(self, number: int, time: float, size: float, end: float, tape: Tape | None) -> tuple[bool, float]:
        """See `AdaptiveStepper.attempt`."""
        stepper, ts, stages = self._stepper, self._ts, self._stages
        method = stepper.method
        direction = math.copysign(1.0, size)
        kept: Tape | None = None if tape is None else []
        # PETSc's time of the last stage can differ from the next step's in the last bit, and so could f.
        stages.start(time, size, end, kept, self._first, self._rejected)
        vectors.fill(self._solution, stepper.current.flat, stepper.layout.vec_device)
        ts.setTime(direction * time)
        ts.setTimeStep(direction * size)
        ts.setStepNumber(number)
        if self._fresh or (self._rejected and method.fsal):
            ts.restartStep()
        try:
            with torch.no_grad(), stepper.errors_of_func():
                ts.step()
        except PETSc.Error as error:
            if error.ierr != _NOT_A_NUMBER:
                raise
            # All ranks get here: it is the norm of the error over all of them. The TS is spoilt, the state is not.
            stepper.failed = False
            self._ts.destroy()
            stages.forget_views()
            self._ts = self._create_ts()
            self._tolerances.give(self._ts)
            self._fresh, self._rejected, self._first = True, False, None
            return False, math.nan
        slopes = stages.slopes
        stages.end()
        self._fresh = False
        accepted = ts.getConvergedReason() != PETSc.TS.ConvergedReason.DIVERGED_STEP_REJECTED
        proposed = direction * ts.getTimeStep()
        self._rejected = not accepted
        if not accepted:
            ts.setConvergedReason(PETSc.TS.ConvergedReason.ITERATING)
            self._first = slopes[0], kept[0] if kept else None
            return False, proposed
        self._first = (slopes[-1], kept[-1] if kept else None) if method.fsal else None
        stepper.form_result(size, slopes)
        if tape is not None:
            assert kept is not None
            counts = stepper.tableau.counts
            tape += [graph if needed else None for graph, needed in zip(kept, counts, strict=True)]
        return True, proposed


@dataclass(frozen=True)
class AcceptedStep:
    """Step `number` from `start` by `size`; `output` is the number of the output time that it ends at, if any."""

    number: int
    start: float
    size: float
    output: int | None
    tape: Tape | None


def integrate(
    adaptive: AdaptiveStepper,
    times: tuple[float, ...],
    control: ErrorControl,
    before: Callable[[int, float], bool],
    after: Callable[[AcceptedStep], None],
    carried: Carried,
) -> int:
    """Step through `times`, landing on each of them; returns how many attempts were rejected. Collective.

    `before(number, time)` is called ahead of each step and says whether to record it, `after` when it is accepted.
    Raises `StepSizeError` when steps become too small for the time to change.
    """
    adaptive.begin(control)
    time, number, rejected = times[0], 0, 0
    try:
        with carried.aside():
            wanted = control.first_size or adaptive.first_size(time, times[1] - time)
        for output, target in enumerate(times[1:], start=1):
            while time != target:
                tape: Tape | None = [] if before(number, time) else None
                size, wanted, rejections = _accepted(adaptive, number, time, target, wanted, tape)
                lands = size == target - time
                after(AcceptedStep(number, time, size, output if lands else None, tape))
                time = target if lands else time + size
                number += 1
                rejected += rejections
    finally:
        adaptive.end()
    return rejected


def _accepted(
    adaptive: AdaptiveStepper, number: int, time: float, target: float, wanted: float, tape: Tape | None
) -> tuple[float, float, int]:
    """Attempt step `number` until it is accepted: its size, the size wanted for the next, and the rejections."""
    size = _fitted(wanted, target - time)
    for rejections in range(_MOST_REJECTIONS):
        lands = size == target - time
        accepted, proposed = adaptive.attempt(number, time, size, target if lands else time + size, tape)
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
