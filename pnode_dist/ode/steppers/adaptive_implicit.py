"""Attempts of implicit steps with error control.

An attempt whose equations cannot be solved counts as rejected, like in PETSc, and is repeated with a smaller size.
"""

from __future__ import annotations

import math

import numpy as np
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.given_options import check_read, read_at_set_up
from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.steppers.base import PetscOptions, options_database
from pnode_dist.ode.steppers.implicit import ImplicitStepper
from pnode_dist.ode.steppers.implicit_ts import reason_name, stop_at_failure
from pnode_dist.ode.steppers.tape import Tape
from pnode_dist.ode.steppers.tolerances import ErrorControl, Tolerances
from pnode_dist.petsc import calls


class ImplicitAttempts:
    """See `pnode_dist.ode.steppers.adaptive.AdaptiveStepper`.

    A theta method estimates its error from the last accepted step, so its first step is accepted without an estimate.
    Raises `ConfigurationError` for a method without an error estimate.
    """

    def __init__(self, stepper: ImplicitStepper, adaptor: str, options: PetscOptions) -> None:
        method = stepper.method
        if not method.estimates_error or stepper.is_midpoint:
            raise ConfigurationError(
                f"method = {method.name!r}: has no error estimate to adapt steps to (rtol, atol); `pnode-dist methods` "
                "tells which have one, theta only with ts_theta_endpoint"
            )
        self._stepper = stepper
        self._before = stepper.current.flat.clone()
        self._earlier = stepper.current.flat.clone()
        self._tolerances = Tolerances(stepper)
        self.first_size = self._tolerances.first_size
        self._fresh = True
        self._unsolved = ""
        self._ts = stepper.create_ts()
        unread = set(options) - read_at_set_up(options)
        with options_database({**stepper.defaults, **options, "ts_adapt_type": adaptor}, unread):
            self._ts.setFromOptions()
        check_read(unread)
        stop_at_failure(self._ts)
        stepper.set_up(self._ts)

    def begin(self, control: ErrorControl) -> None:
        """See `AdaptiveStepper.begin`."""
        self._fresh = True
        self._tolerances.take(control, self._ts)

    def end(self) -> None:
        """See `AdaptiveStepper.end`: nothing is kept from step to step."""

    def destroy(self) -> None:
        """See `AdaptiveStepper.destroy`."""
        self._ts.destroy()
        self._tolerances.destroy()

    def attempt(self, number: int, time: float, size: float, end: float, tape: Tape | None) -> tuple[bool, float]:
        """See `AdaptiveStepper.attempt`. Collective on the communicator."""
        stepper, ts = self._stepper, self._ts
        self._before.copy_(stepper.current.flat)
        if self._fresh or stepper.method.family != "theta":
            ts.restartStep()
        else:
            # Restore the state one step earlier, which PETSc overwrites also in a rejected attempt.
            self._array()[:] = self._earlier.numpy()
        with stepper.errors_of_func():
            reason = stepper.attempt(ts, number, time, size)
            if reason >= 0 and tape is not None:
                tape.extend(stepper.stage_tape(ts, time, size, "graph"))
        if reason < 0:
            stepper.current.set_flat(self._before)
            rejected = reason == ts.ConvergedReason.DIVERGED_STEP_REJECTED
            proposed = math.copysign(ts.getTimeStep(), size) if rejected else math.nan
            self._unsolved = "" if rejected else _reason_of(ts)
            return False, proposed
        self._fresh = False
        self._earlier.copy_(self._before)
        return True, math.copysign(ts.getTimeStep(), size)

    def state_changed(self, before: Parts) -> None:
        """See `AdaptiveStepper.state_changed`.

        The error of a theta method follows from differences of its states. Move the earlier one along with the present
        one, so that their difference is still that of the step.
        """
        layout, state = self._stepper.layout, self._stepper.current.parts
        for earlier, old, new in zip(layout.parts(self._earlier), before, state, strict=True):
            earlier.add_(new - old)

    def rejection(self) -> str:
        """See `AdaptiveStepper.rejection`. PETSc does not report the components of its estimate."""
        return self._unsolved or "the error is larger than the tolerance"

    def _array(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return calls.local_array(calls.stage_handles(self._ts)[0], self._stepper.layout.size)


def _reason_of(ts: PETSc.TS) -> str:
    """Return why the equations of an attempt were not solved."""
    reason = ts.getSNES().getConvergedReason()
    return f"its equations were not solved: {reason_name(PETSc.SNES.ConvergedReason, reason)}"
