"""The settings of a solve: `SolverSettings` of the user, and `CallSettings` of one call.

`SolverKeywords` has the same names and types as `SolverSettings`, for type checkers (PEP 692). A test compares them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, TypedDict, TypeVar

import torch

from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.checkpointing.plan import Plan
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.compiled import Compiler
from pnode_dist.ode.rhs.mass import Mass
from pnode_dist.ode.rhs.observed import Observation
from pnode_dist.ode.saving import Save, Saving, saving
from pnode_dist.ode.steppers.base import PetscOptions
from pnode_dist.ode.steppers.preconditioner import Preconditioner
from pnode_dist.ode.steppers.step_rule import COEFFICIENTS, NO_CALLBACKS, PidRule, StepCallbacks, StepRule
from pnode_dist.ode.steppers.tolerances import (
    DEFAULT_ATOL,
    DEFAULT_RTOL,
    ErrorControl,
    StepLimits,
    Tolerance,
    check_max_steps,
    is_positive,
)
from pnode_dist.ode.time_grid import TimeGrid
from pnode_dist.partition.protocol import Partition

Times = torch.Tensor | Sequence[float]
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, eq=False)
class SolverSettings:
    """The settings of a solve. `odeint` and `NeuralODE` take them as keyword arguments, or as one object.

    They are checked at a solve, on all ranks alike. `dataclasses.replace` returns a changed copy.
    """

    method: str | None = None
    """The name of a method, see `pnode-dist methods`. By default `rk4`, or `dopri5` with error control."""
    step_size: float | None = None
    """The longest step. With None each interval between output times is one step. With error control it is another name
    of `first_step`."""
    rtol: Tolerance | None = None
    """Relative tolerance of error control: a number, or tensors that broadcast to this rank's state. Steps have a fixed
    size unless `rtol` or `atol` is given. By default 1e-6 beside `atol`."""
    atol: Tolerance | None = None
    """Absolute tolerance of error control, in the units of the state. By default 1e-9 beside `rtol`."""
    adaptor: str = "basic"
    """The controller of the step size for error control: PETSc's `basic` or `dsp`, or `pid` for explicit methods."""
    pcoeff: float | None = None
    """The proportional coefficient of `adaptor="pid"`, in diffrax's meaning (see `PidRule`). By default 0."""
    icoeff: float | None = None
    """The integral coefficient of `adaptor="pid"`. By default 1."""
    dcoeff: float | None = None
    """The derivative coefficient of `adaptor="pid"`. By default 0."""
    first_step: float | None = None
    """The size of the first step with error control. None chooses one."""
    dt_min: float | None = None
    """The least size with error control: `StepSizeError` if a step of this size is rejected. A step that ends at an
    output time may be shorter."""
    dt_max: float | None = None
    """The longest step with error control."""
    max_steps: int | None = None
    """The most steps of a solve, rejected ones included. `StepSizeError` beyond."""
    partition: Partition | None = None
    """The distribution of the state over ranks. With None each rank has a state of its own."""
    trajectory: CheckpointBudget | None = None
    """The budget for checkpoints and tapes. By default half of the memory available to the rank."""
    params: Sequence[torch.Tensor] | None = None
    """Parameters of func that cannot be found in it. An error reports if that is needed."""
    options: PetscOptions | None = None
    """PETSc options of the solver, by name without the dash; None is the value of an option without one."""
    mass: Mass | None = None
    """The constant matrix M of M du/dt = func(t, u), for theta, Gauss and Radau methods. It may be singular, see
    `mass_matrix`."""
    preconditioner: Preconditioner | str | None = None
    """The preconditioner of the linear systems of implicit methods: `none`, `block`, `assembled`, or an object of
    `pnode_dist.ode.steppers.preconditioner`."""
    compute_dtype: torch.dtype | None = None
    """The floating type in which func computes. By default that of u0."""
    state_dtype: torch.dtype | None = None
    """The type of state, adjoint and checkpoints: `torch.float32` or `torch.float64`. With None explicit Runge-Kutta
    methods take the wider type of u0 and func, and at least float32. All others have PETSc's scalar type."""
    last_only: bool = False
    """Return the state at the last time only: short for `save="last"`."""
    save: Save = "times"
    """The outputs: the states at the output `"times"`, at the `"last"` time, at all accepted `"steps"`, at every n-th
    step for a number n, or several of these in a tuple. With steps a solve returns `Saved(t, u)`, the times too."""
    observe: Observation | None = None
    """A function h(t, u, *args), whose values are returned in place of the states: a tensor, or a tuple or a dictionary
    of tensors. A solve then takes the memory of these. h may have parameters and may communicate."""
    between_steps: Callable[..., Any] | None = None
    """A map m(t, u, *args) to a state like u, whose value takes the place of the state after each accepted step; t is
    the end of the step. A filter, a limiter or a projection: it may have parameters and may communicate."""
    integrate: Callable[..., Any] | None = None
    """A running cost r(t, u, *args), a tensor or several: a solve then returns `Integrated(u, integral)` with its
    integrals up to the output times, by the quadrature of an explicit or theta method. Error control leaves them
    out."""
    on_output: Callable[[float, Any], None] | None = None
    """A function that is called with the time and value of each output while the solve goes on. Nothing is returned
    then, and there is no gradient."""
    on_mismatch: str = "raise"
    """The action if a step recomputed for the gradient differs from the forward pass: `raise`, `warn` or `ignore`."""
    preserve_rng_state: bool = True
    """Draw the same random numbers of torch in recomputed steps. False saves time for a func that draws none."""
    newton: str = "auto"
    """The solver of the equations of implicit methods: `petsc`, or `batch` for samples (the first axis of the state) of
    few components that do not depend on one another. `auto` chooses `batch` where it can."""
    jumps: Times | None = None
    """Times at which func jumps or has a kink. A step ends at each of them that lies between the output times. func
    gets the next number before a jump in the step that ends there, and the next number after it in the step that
    begins there. Error control starts anew. Jumps are constant: they have no gradient."""


class SolverKeywords(TypedDict, total=False):
    """The names and types of `SolverSettings`, as keyword arguments."""

    method: str | None
    step_size: float | None
    rtol: Tolerance | None
    atol: Tolerance | None
    adaptor: str
    pcoeff: float | None
    icoeff: float | None
    dcoeff: float | None
    first_step: float | None
    dt_min: float | None
    dt_max: float | None
    max_steps: int | None
    partition: Partition | None
    trajectory: CheckpointBudget | None
    params: Sequence[torch.Tensor] | None
    options: PetscOptions | None
    mass: Mass | None
    preconditioner: Preconditioner | str | None
    compute_dtype: torch.dtype | None
    state_dtype: torch.dtype | None
    last_only: bool
    save: Save
    observe: Observation | None
    between_steps: Callable[..., Any] | None
    integrate: Callable[..., Any] | None
    on_output: Callable[[float, Any], None] | None
    on_mismatch: str
    preserve_rng_state: bool
    newton: str
    jumps: Times | None


_OF_CONTROL = (*COEFFICIENTS, "first_step", "dt_min", "dt_max")
KEYWORDS = tuple(field.name for field in fields(SolverSettings))


@dataclass(frozen=True, kw_only=True, eq=False)
class CallSettings(SolverSettings):
    """The settings of one call: those of its user, and those that have no keyword.

    `fixed_plan` is the plan to use, and `compiler` compiles f. `grid` are the steps, in place of `step_size`. `rule`
    chooses the sizes of steps with error control, in place of PETSc's `adaptor`. `callbacks` are called at each step.
    `uncontrolled` is the number of parts at the end of the state that error control leaves out.
    `compared` are the names and values of further settings of the caller, which must be equal on all ranks.
    """

    fixed_plan: Plan | None = None
    compiler: Compiler | None = None
    grid: TimeGrid | None = None
    rule: StepRule | None = None
    callbacks: StepCallbacks = NO_CALLBACKS
    uncontrolled: int = 0
    compared: tuple[tuple[str, Any], ...] = ()

    @property
    def saving(self) -> Saving:
        """The outputs of the solve. Raises `ConfigurationError` for an unknown choice."""
        return saving(self.save, self.last_only)

    def control(self) -> ErrorControl | None:
        """Return the error control; None for steps of fixed size. Raises `ConfigurationError` for wrong settings."""
        check_max_steps(self.max_steps)
        given = [name for name in _OF_CONTROL if getattr(self, name) is not None]
        if self.rtol is None and self.atol is None:
            for name in given:
                raise ConfigurationError(f"{name} = {getattr(self, name)!r}: needs rtol or atol; step_size is fixed")
            return None
        for name in ("first_step", "dt_min", "dt_max"):
            value = getattr(self, name)
            if value is not None and not is_positive(value):
                raise ConfigurationError(f"{name} = {value!r}: must be a positive number")
        if self.first_step is not None and self.step_size is not None:
            raise ConfigurationError(
                f"step_size = {self.step_size!r}: is another name of first_step = {self.first_step!r} with rtol or "
                "atol: give one of them"
            )
        rtol = DEFAULT_RTOL if self.rtol is None else self.rtol
        atol = DEFAULT_ATOL if self.atol is None else self.atol
        limits = StepLimits(self.dt_min or 0.0, self.dt_max or math.inf, self.max_steps)
        first, name = (self.step_size, "step_size") if self.first_step is None else (self.first_step, "first_step")
        if first is not None and limits.within(first) != first:
            raise ConfigurationError(f"{name} = {first!r}: must be within dt_min and dt_max")
        uncontrolled = self.uncontrolled
        return ErrorControl(rtol, atol, self.adaptor, first, self._size_rule(), self.callbacks, uncontrolled, limits)

    def _size_rule(self) -> StepRule | None:
        """Return the rule that chooses the sizes of steps; None for PETSc's adaptors."""
        given = {name: getattr(self, name) for name in COEFFICIENTS if getattr(self, name) is not None}
        if self.adaptor == "pid":
            return PidRule(**given)
        for name, value in given.items():
            raise ConfigurationError(
                f"{name} = {value!r}: adaptor = {self.adaptor!r} has no such coefficient: must be 'pid'"
            )
        return self.rule


def without_control(settings: CallSettings) -> CallSettings:
    """Return the settings for repeating the steps of a solve with error control."""
    given = ("rtol", "atol", "step_size", "max_steps", *_OF_CONTROL)
    changes: dict[str, Any] = dict.fromkeys(given)
    return replace(settings, **changes, adaptor="basic")


def refuse_other_outputs(settings: SolverSettings, caller: str, takes_steps: bool = True) -> None:
    """Raise `ConfigurationError` for outputs other than the states at all output times, which `caller` needs.

    `takes_steps`: the caller evaluates the solution within steps, so there is no map between them either.
    """
    if takes_steps and settings.between_steps is not None:
        raise ConfigurationError(
            f"between_steps: {caller} has a solution within each step, which a map at its end would break: must be "
            "None; odeint and NeuralODE take it"
        )
    chosen = {"observe": None, "integrate": None, "on_output": None, "save": "times", "last_only": False}
    for name, default in chosen.items():
        value = getattr(settings, name)
        if value is not default and value != default:
            raise ConfigurationError(f"{name} = {value!r}: must be {default!r}, because {caller} needs all states")


def merged(settings: SolverSettings | None, keywords: Mapping[str, Any], caller: str) -> SolverSettings:
    """Return `settings` with the keyword arguments of `caller` in place of its fields.

    Raises `TypeError` for an unknown keyword, with the likely one, and `ConfigurationError` for other settings.
    """
    for name in keywords:
        if name not in KEYWORDS:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}: {_likely(name)}")
    if settings is None:
        return SolverSettings(**keywords)
    if not isinstance(settings, SolverSettings):
        raise ConfigurationError(
            f"settings = {settings!r}: must be a pnode_dist.SolverSettings, or None; give single settings by keyword"
        )
    return SolverSettings(**{name: getattr(settings, name) for name in KEYWORDS} | dict(keywords))


def _likely(name: str) -> str:
    if name == "events":
        return "pnode_dist.solve_events(func, u0, t, events) solves with events"
    close = get_close_matches(name, KEYWORDS, n=1) or [known for known in KEYWORDS if name in known]
    return f"did you mean {' or '.join(close)}?" if close else f"must be one of {', '.join(KEYWORDS)}"


def lists_settings(function: _F) -> _F:
    """Write the keywords of `SolverSettings` into the signature of `function`, for `help` and completion."""
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    keywords = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(SolverSettings)
    ]
    function.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
    return function
