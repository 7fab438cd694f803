"""Steps whose size follows from an estimate of their error, by PETSc's adaptors (TSAdapt).

Which steps are accepted is all that the adjoint needs to know of this: they are replayed with the very same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError, StepSizeError
from pnode_dist.ode.layout import State, StateLayout
from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.rhs import Recording
from pnode_dist.ode.stepper import PetscOptions, Stepper, options_database
from pnode_dist.partition import protocol

ADAPTORS = ("basic", "dsp")
DEFAULT_RTOL, DEFAULT_ATOL = 1e-6, 1e-9
_MOST_REJECTIONS = 100
_NOT_A_NUMBER = 72  # PETSC_ERR_FP
_SMALLEST_RATIO = 8 * np.finfo(np.float64).eps

Tolerance = float | State


@dataclass(frozen=True, eq=False)
class ErrorControl:
    """Steps for which the root mean square over all entries of error / (atol + rtol |u|) is at most 1.

    Tolerances are numbers, or tensors that broadcast to this rank's part of the state (for a tuple one for each part).
    `adaptor` is PETSc's: `basic`, or `dsp` (digital signal processing control: Soederlind, ACM Trans. Math. Softw. 29,
    2003). `first_size` is the size of the first step; None: chosen from f and its change (Hairer, Norsett & Wanner,
    Solving ODEs I, II.4). Raises `ConfigurationError` for tolerances that are not positive or an unknown adaptor.
    """

    rtol: Tolerance = DEFAULT_RTOL
    atol: Tolerance = DEFAULT_ATOL
    adaptor: str = "basic"
    first_size: float | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not (math.isfinite(value) and value > 0):
                raise ConfigurationError(f"{name} = {value!r}: must be positive")
            parts = value if isinstance(value, tuple | list) else [value]
            if any(isinstance(part, torch.Tensor) and not bool((part > 0).all()) for part in parts):
                raise ConfigurationError(f"{name}: every entry must be positive")
        if self.adaptor not in ADAPTORS:
            raise ConfigurationError(f"adaptor = {self.adaptor!r}: must be one of {', '.join(ADAPTORS)}")


class AdaptiveStepper:
    """Attempts of steps with error control, on the state of `stepper`. Collective on its communicator.

    Raises `ConfigurationError` for a method without an error estimate.
    """

    def __init__(self, stepper: Stepper, adaptor: str, options: PetscOptions) -> None:
        method = stepper.method
        if not method.estimates_error:
            able = ", ".join(name for name, other in METHODS.items() if other.estimates_error)
            raise ConfigurationError(
                f"method = {method.name!r}: has no error estimate to adapt steps to (rtol, atol): must be one of {able}"
            )
        self._stepper = stepper
        self._before = stepper.state.clone()
        self._tolerances: list[torch.Tensor | float] = [DEFAULT_RTOL, DEFAULT_ATOL]
        self._petsc_tolerances: list[Any] = [DEFAULT_RTOL, DEFAULT_ATOL]
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
        ts.setMaxSteps(2**31 - 1)
        ts.setMaxTime(1e300)
        return ts

    def begin(self, control: ErrorControl) -> None:
        """Start a solve with the tolerances of `control`. Raises `ConfigurationError` if their shape is wrong."""
        self._fresh, self._rejected, self._first_graph = True, False, None
        given = (("rtol", control.rtol), ("atol", control.atol))
        vecs: list[Any] = []
        for number, (name, tolerance) in enumerate(given):
            if isinstance(tolerance, int | float) and not isinstance(self._petsc_tolerances[number], PETSc.Vec):
                self._tolerances[number] = float(tolerance)
                vecs.append(float(tolerance))
                continue
            # Once PETSc has a Vec of tolerances it heeds no number any more.
            vec = self._stepper.solution.duplicate()
            flat = protocol.view(vec, (self._stepper.layout.size,))
            _spread(name, tolerance, self._stepper.layout, flat)
            vec.stateIncrease()
            self._tolerances[number] = flat
            vecs.append(vec)
        self._petsc_tolerances = vecs
        self._ts.setTolerances(rtol=vecs[0], atol=vecs[1])

    def end(self) -> None:
        """End a solve: the evaluation that a next step would have begun with is not kept alive from here."""
        self._first_graph = None

    def attempt(
        self, number: int, time: float, size: float, end: float, recording: Recording | None
    ) -> tuple[bool, float]:
        """Try a step from `time` by `size`: whether it was accepted, and the size that PETSc proposes to go on with.

        `end` is where the next step would start, `time + size` or an output time that differs in the last bit.

        A step that is not accepted leaves the state as it was. With `recording`, the graphs of the stages that an
        adjoint needs go there. Collective on the communicator.
        """
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
            self._ts.setTolerances(rtol=self._petsc_tolerances[0], atol=self._petsc_tolerances[1])
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

    def first_size(self, time: float, span: float) -> float:
        """A size to begin with, for a solve that goes on for `span`. Collective on the communicator.

        E. Hairer, S. P. Norsett, G. Wanner: Solving Ordinary Differential Equations I, 2nd ed., section II.4.
        """
        stepper = self._stepper
        state = stepper.state.clone()
        rtol, atol = self._tolerances
        scale = atol + rtol * state.abs()
        slope = stepper.derivative(time, math.copysign(1.0, span))
        size, speed = self._norm(state / scale), self._norm(slope / scale)
        first = 1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
        first = min(first, abs(span))
        stepper.state.copy_(state + math.copysign(first, span) * slope)
        stepper.touched()
        later = stepper.derivative(time + math.copysign(first, span), math.copysign(1.0, span))
        bend = self._norm((later - slope) / scale) / first
        stepper.state.copy_(state)
        stepper.touched()
        steepest = max(speed, bend)
        order = stepper.method.order
        second = max(1e-6, first * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / (order + 1))
        chosen = min(100 * first, second, abs(span))
        return chosen if math.isfinite(chosen) else abs(span) * 1e-6

    def _norm(self, values: torch.Tensor) -> float:
        sums = np.array([values.square().sum().item(), values.numel()])
        self._stepper.comm.Allreduce(MPI.IN_PLACE, sums, MPI.SUM)
        return math.sqrt(sums[0] / max(sums[1], 1.0))


def _spread(name: str, tolerance: Tolerance, layout: StateLayout, flat: torch.Tensor) -> None:
    tolerances = tolerance if isinstance(tolerance, tuple | list) else (tolerance,) * len(layout.shapes)
    if len(tolerances) != len(layout.shapes):
        raise ConfigurationError(f"{name}: {len(tolerances)} parts for a state of {len(layout.shapes)}")
    for target, values in zip(layout.parts(flat), tolerances, strict=True):
        try:
            target.copy_(torch.as_tensor(values).expand(target.shape))
        except RuntimeError:
            raise ConfigurationError(
                f"{name}: shape {tuple(torch.as_tensor(values).shape)} does not broadcast to this rank's part of shape "
                f"{tuple(target.shape)}"
            ) from None


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
