"""Attempts of explicit steps on tensors, with the error of the embedded method and a `StepRule`.

PETSc takes no part in an attempt: its adaptors have neither these rules, nor a norm of the caller's, nor the two
estimates of DOP853.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.steppers.attempt import Attempt, CompiledAttempt, First, attempted, complete
from pnode_dist.ode.steppers.base import PetscOptions, Stepper
from pnode_dist.ode.steppers.error_estimate import Factors, corrected, difference, largest_component, tolerated
from pnode_dist.ode.steppers.explicit import ExplicitStepper
from pnode_dist.ode.steppers.explicit_step import combined
from pnode_dist.ode.steppers.step_rule import NO_CALLBACKS, PidRule, StepRule, call_back
from pnode_dist.ode.steppers.tape import Tape
from pnode_dist.ode.steppers.tolerances import DEFAULT_ATOL, DEFAULT_RTOL, ErrorControl, of_parts


class EmbeddedAttempts:
    """Attempts of steps on the state of `stepper`, see `AdaptiveStepper`. Collective on its communicator.

    Without a rule they have integral control, as in PETSc's adaptor `basic`. Raises `ConfigurationError` for a method
    without an error estimate, and for options of PETSc's adaptors.
    """

    def __init__(self, stepper: Stepper, options: PetscOptions) -> None:
        for name in options:
            if name.removeprefix("-").startswith("ts_adapt_"):
                raise ConfigurationError(
                    f"options: {name!r}: is for PETSc's adaptors, which take no part here: adaptor = 'pid' and the two "
                    "error estimates of dop853 use dt_min, dt_max, pcoeff, icoeff and dcoeff"
                )
        if not (isinstance(stepper, ExplicitStepper) and stepper.scheme.error_terms):
            able = ", ".join(
                name for name, method in METHODS.items() if method.family == "rk" and method.estimates_error
            )
            raise ConfigurationError(
                f"method = {stepper.method.name!r}: has no error estimate for a step rule: must be one of {able}"
            )
        self._stepper = stepper
        self._rule, self._callbacks = StepRule(), NO_CALLBACKS
        parts = len(stepper.layout.shapes)
        self._rtol: Factors = (DEFAULT_RTOL,) * parts
        self._atol: Factors = (DEFAULT_ATOL,) * parts
        self._controlled = parts
        self._first: First | None = None
        self._earlier = (1.0, 1.0)
        self._rejected: tuple[float, float, Attempt | CompiledAttempt] | None = None

    def begin(self, control: ErrorControl) -> None:
        """See `AdaptiveStepper.begin`."""
        layout = self._stepper.layout
        self._rule, self._callbacks, self._first = control.rule or PidRule(), control.callbacks, None
        self._earlier, self._rejected = (1.0, 1.0), None
        self._rtol = of_parts("rtol", control.rtol, layout, control.uncontrolled)
        self._atol = of_parts("atol", control.atol, layout, control.uncontrolled)
        self._controlled = len(layout.shapes) - control.uncontrolled

    def end(self) -> None:
        """End a solve, and drop the evaluation that is kept for the next step."""
        self._first, self._rule, self._callbacks = None, StepRule(), NO_CALLBACKS
        self._rejected = None

    def destroy(self) -> None:
        """See `AdaptiveStepper.destroy`: there are no PETSc objects."""

    def attempt(self, number: int, time: float, size: float, end: float, tape: Tape | None) -> tuple[bool, float]:
        """See `AdaptiveStepper.attempt`."""
        stepper, rule, callbacks = self._stepper, self._rule, self._callbacks
        before, self._rejected = stepper.current.parts, None
        call_back(callbacks.step, stepper.layout, time, before, size)
        stepper.stepping = True
        try:
            attempt = complete(attempted(stepper, time, size, end, tape is not None, self._first))
            with torch.no_grad():
                ratio = self._error_ratio(size, attempt)
        finally:
            stepper.stepping = False
        accepted = rule.accepts(abs(size), ratio)
        proposed = math.copysign(rule.next_size(abs(size), (ratio, *self._earlier), stepper.method.order), size)
        call_back(callbacks.accept if accepted else callbacks.reject, stepper.layout, time, before, size)
        if accepted:
            self._earlier = ratio or 1.0, self._earlier[0]
            self._first = attempt.accept(tape)
        else:
            self._rejected = ratio, size, attempt
            self._first = attempt.first_again()
        return accepted, proposed

    def state_changed(self, before: Parts) -> None:
        """See `AdaptiveStepper.state_changed`: f at the last stage is not that at the first one of the next step."""
        self._first = None

    def rejection(self) -> str:
        """See `AdaptiveStepper.rejection`."""
        assert self._rejected is not None
        ratio, size, attempt = self._rejected
        stepper, before = self._stepper, self._stepper.current.parts
        with torch.no_grad():
            scales = tolerated(before, attempt.result, self._rtol, self._atol)
            largest = largest_component(
                stepper.comm, stepper.tableau, size, attempt.slopes, scales, stepper.layout.is_tuple
            )
        return f"the error is {ratio:.3g} times the tolerance, and {largest}"

    def first_size(self, time: float, span: float) -> float:
        """See `AdaptiveStepper.first_size`: the choice of torchdiffeq, two evaluations of f."""
        stepper, order, sign = self._stepper, self._stepper.method.order, math.copysign(1.0, span)
        state = stepper.current.parts
        with torch.no_grad():
            scales = tolerated(state, state, self._rtol, self._atol)
            slopes = stepper.evaluate(time, state)
            size, speed = self._norm(state, scales), self._norm(slopes, scales)
            first = 1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
            later = stepper.evaluate(time + sign * first, combined(state, sign * first, ((0, 1.0),), [slopes]))
            changes = tuple(after - before for after, before in zip(later, slopes, strict=True))
            bend = self._norm(changes, scales) / first
        # The first step begins with the same evaluation, unless it is put on a tape.
        self._first = First(slopes)
        steepest = max(speed, bend)
        second = max(1e-6, first * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / order)
        chosen = min(100 * first, second)
        return self._rule.limited(chosen if math.isfinite(chosen) else abs(span) * 1e-6)

    def _error_ratio(self, size: float, attempt: Attempt | CompiledAttempt) -> float:
        """Return the norm of the error estimate relative to the tolerances."""
        tableau, scaled = self._stepper.tableau, size * self._rule.error_scale
        scales = tolerated(self._stepper.current.parts, attempt.result, self._rtol, self._atol)
        ratio = self._norm(difference(tableau.error_terms, scaled, attempt.slopes), scales)
        if not tableau.second_error_terms:
            return ratio
        return corrected(ratio, self._norm(difference(tableau.second_error_terms, scaled, attempt.slopes), scales))

    def _norm(self, values: Sequence[torch.Tensor], scales: Parts) -> float:
        """Return the norm of `values / scales`. Collective if the state is distributed."""
        stepper = self._stepper
        ratios = [value / scale for value, scale in zip(values, scales, strict=True)][: self._controlled]
        if self._rule.norm is not None:
            return _number(self._rule.norm(stepper.layout.as_state(ratios)))
        sums = np.array([(ratio.square().sum(dtype=torch.float64).item(), ratio.numel()) for ratio in ratios])
        if stepper.comm.size > 1:
            stepper.comm.Allreduce(MPI.IN_PLACE, sums, MPI.SUM)
        if not self._rule.norm_of_parts:
            sums = sums.sum(axis=0, keepdims=True)
        # NumPy's maximum is NaN if any entry is; Python's is not.
        return float(np.sqrt(sums[:, 0] / np.maximum(sums[:, 1], 1)).max())


def _number(norm: Any) -> float:
    """Return the result of the caller's norm as a number."""
    try:
        return abs(float(norm))
    except (TypeError, ValueError, RuntimeError):
        found = f"a tensor of shape {tuple(norm.shape)}" if isinstance(norm, torch.Tensor) else type(norm).__name__
        raise ConfigurationError(f"options: norm returned {found}: must return a number") from None
