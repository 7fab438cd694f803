"""The settings of a steady state, with PETSc's names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.layout import State
from pnode_dist.ode.steppers.base import PetscOptions
from pnode_dist.ode.steppers.implicit_ts import newton_tolerances
from pnode_dist.ode.steppers.preconditioner import Preconditioner
from pnode_dist.partition.protocol import Partition

SOLVERS = ("newtonls", "newtontr", "pseudo")
_NO_ATOL = 1e-50
_TOLERANCES = {"snes_rtol": "rtol", "snes_atol": "atol", "snes_stol": "stol", "snes_max_it": "max_it"}
_OF_NEWTON = {"snes_type": "solver", **_TOLERANCES}
_OF_PSEUDO = {
    "ts_type": "solver",
    "ts_max_steps": "max_it",
    "ts_dt": "step_size",
    "ts_time_step": "step_size",
    "ts_pseudo_fatol": "atol",
    "ts_pseudo_frtol": "rtol",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SteadySettings:
    """The settings of a steady state. `steady_state` takes them as keyword arguments."""

    partition: Partition | None = None
    """The distribution of the state over ranks. With None each rank has a state of its own."""
    t: float = 0.0
    """The time at which func is evaluated."""
    params: Sequence[torch.Tensor] | None = None
    """Parameters of func that cannot be found in it. An error reports if that is needed."""
    solver: str = "newtonls"
    """PETSc's SNES of Newton's method with a line search (`newtonls`) or with a trust region (`newtontr`), or its TS of
    pseudo-transient continuation (`pseudo`)."""
    preconditioner: Preconditioner | str | None = None
    """The preconditioner of the linear systems, that of `odeint`: `none`, `block`, `assembled`, or an object of
    `pnode_dist.ode.steppers.preconditioner`."""
    rtol: float | None = None
    """The residual |f(u)| over that of `u0` at which the solve ends, in the 2-norm over all ranks. By default 1e-9, and
    1e-5 if func computes in float32."""
    atol: float = _NO_ATOL
    """The residual |f(u)| at which the solve ends, in the same norm and in the units of f."""
    stol: float | None = None
    """The size of a Newton step over that of u at which the solve ends. By default 1e-12, and 1e-7 if func computes in
    float32. Not for `pseudo`."""
    max_it: int | None = None
    """The largest number of Newton iterations, by default 50, or of pseudo-time steps, by default 1000."""
    step_size: float | None = None
    """The first step of pseudo-time, in the units of t. By default 0.1. For `pseudo` alone."""
    deflate: State | Sequence[State] = ()
    """Steady states that must not be found again, like `u0`: one, or several."""
    phase: State | Sequence[State] = ()
    """Vectors v like `u0`, one or several: the steady state fulfils <v, u - u0> = 0."""
    compute_dtype: torch.dtype | None = None
    """The floating type in which func computes. By default that of u0."""
    options: PetscOptions | None = None
    """PETSc options of the solver, by name without the dash; None is the value of an option without one."""

    def check(self) -> None:
        """Raise `ConfigurationError` for a value that is not allowed."""
        if self.solver not in SOLVERS:
            raise ConfigurationError(f"solver = {self.solver!r}: must be one of {', '.join(SOLVERS)}")
        if isinstance(self.t, torch.Tensor) and self.t.requires_grad:
            raise ConfigurationError("t: requires a gradient, which is not available: give the time by args=(...)")
        for name in ("rtol", "atol", "stol", "step_size", "t"):
            _check_number(name, getattr(self, name), name == "t")
        if self.max_it is not None and (not isinstance(self.max_it, int) or self.max_it < 1):
            raise ConfigurationError(f"max_it = {self.max_it!r}: must be a whole number of at least 1, or None")
        if self.is_pseudo and self.stol is not None:
            raise ConfigurationError(f"stol = {self.stol!r}: solver = 'pseudo' has no such test: use rtol or atol")
        if self.step_size is not None and not (self.is_pseudo and self.step_size > 0):
            allowed = "must be above 0" if self.is_pseudo else f"solver = {self.solver!r} takes no steps of time"
            raise ConfigurationError(f"step_size = {self.step_size!r}: {allowed}")
        if self.is_pseudo and not _is_empty(self.deflate):
            raise ConfigurationError(
                "deflate: solver = 'pseudo' would follow the same path at another speed: must be newtonls or newtontr"
            )
        arguments = _OF_PSEUDO if self.is_pseudo else _OF_NEWTON
        for option in self.options or ():
            name = str(option).removeprefix("-")
            if name in arguments:
                raise ConfigurationError(f"options: {option!r}: is an argument of its own: {arguments[name]}=")

    @property
    def is_pseudo(self) -> bool:
        """True for pseudo-transient continuation."""
        return self.solver == "pseudo"

    def relative_tolerance(self, dtype: torch.dtype) -> float:
        """Return `rtol`, or its default for a func that computes in `dtype`."""
        return newton_tolerances(dtype)[0] if self.rtol is None else float(self.rtol)

    def petsc_options(self, dtype: torch.dtype, target: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the options that PETSc's command line may replace, and those that it may not.

        func computes in `dtype`, and pseudo-transient continuation ends at the residual `target`.
        """
        given = {name: getattr(self, name) for name in ("rtol", "stol", "max_it")}
        given |= {} if self.atol == _NO_ATOL else {"atol": self.atol}
        given = {f"snes_{name}": value for name, value in given.items() if value is not None}
        if self.is_pseudo:
            # One linear solve a step, as in the literature: the steps grow no faster than the residual falls.
            steps = {} if self.max_it is None else {"ts_max_steps": self.max_it}
            usual = {"snes_type": "ksponly", "ts_max_steps": 1000}
            return usual, {"ts_pseudo_fatol": target, "ts_pseudo_frtol": 0.0, **steps}
        rtol, stol = newton_tolerances(dtype)
        return {"snes_rtol": rtol, "snes_stol": stol, "snes_atol": _NO_ATOL, "snes_max_it": 50}, given


def _is_empty(states: State | Sequence[State]) -> bool:
    return isinstance(states, tuple | list) and len(states) == 0


def _check_number(name: str, value: Any, signed: bool) -> None:
    if value is None:
        return
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (number < 0 and not signed):
        raise ConfigurationError(f"{name} = {value!r}: must be a number{'' if signed else ' of at least 0'}")
