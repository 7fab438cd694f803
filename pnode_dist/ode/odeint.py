"""`odeint` and `NeuralODE`: a solve as one differentiable operation.

C. Zhang, W. Zhao: A memory-efficient neural ordinary differential equation framework based on high-level adjoint
differentiation, IEEE Trans. Artif. Intell. (2022), arXiv 2206.01298 (PNODE): the adjoint of the time integration is
discrete and exact, only f itself is differentiated by the automatic tool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any, overload

import torch
from torch import nn

from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.checkpointing.plan import Plan, Plans
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import methods
from pnode_dist.ode.autograd.call import Asked, Call, Prepare
from pnode_dist.ode.autograd.differentiable import solution, tangent_call_of
from pnode_dist.ode.autograd.outside_graphs import outside_graphs
from pnode_dist.ode.autograd.transformed import transformed
from pnode_dist.ode.autograd.transforms import check_not_traced, transforming
from pnode_dist.ode.call_agreement import preparation
from pnode_dist.ode.coarse import finer_end, is_first_of_its_kind, warn_if_coarse
from pnode_dist.ode.kept_solvers import KeptSolvers, NoSolvers
from pnode_dist.ode.prepare import prepared, settings_of_tangents, usable_outside_inference
from pnode_dist.ode.rhs.compiled import Compiler
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import Parts, State, StateLayout, layout_of
from pnode_dist.ode.rhs.mass import Mass
from pnode_dist.ode.rhs.parameters import find_parameters, independent
from pnode_dist.ode.rhs.tangent import WithTangent, checked_direction, stacked, with_tangent, without_tangents
from pnode_dist.ode.settings import Settings, Times
from pnode_dist.ode.solve import Solve
from pnode_dist.ode.solve_lock import solve_lock
from pnode_dist.ode.solve_plans import measured_plans
from pnode_dist.ode.solver import communicator
from pnode_dist.ode.steppers.base import PetscOptions
from pnode_dist.ode.steppers.preconditioner import Preconditioner
from pnode_dist.ode.steppers.tolerances import Tolerance
from pnode_dist.partition.protocol import Partition


def _solve(
    solvers: KeptSolvers,
    tangent_solvers: KeptSolvers,
    func: Function,
    u0: State,
    t: Times,
    settings: Settings,
    args: tuple[Any, ...],
) -> tuple[State, Solve]:
    check_not_traced()
    if torch.is_inference_mode_enabled() and methods.resolve(settings.method or "rk4").implicit:
        # Newton's method needs derivatives of f, which inference mode does not allow.
        with torch.inference_mode(False), torch.no_grad():
            usable = tuple(map(usable_outside_inference, args))
            return _solve(solvers, tangent_solvers, func, usable_outside_inference(u0), t, settings, usable)
    with solve_lock():
        if transforming():
            call, layout, tensors = _transformed(solvers, tangent_solvers, func, u0, t, settings, args)
            return layout.as_state(solution(call, tensors)), call.latest()
        solve, layout, tensors = prepared(solvers, func, u0, t, settings, args)
        prepare = _preparation(solvers, tangent_solvers, t, settings, layout.is_tuple, len(layout.shapes))
        asked = Asked(
            func,
            args,
            len(layout.shapes),
            layout.is_tuple,
            replace(solve.bound.parameters, tensors=solve.parameters),
            solve.bound.needs_time_gradient,
            solve.solver.stepper.comm.size,
            prepare,
            solve.surroundings,
            solve.carried,
        )
        call = Call(asked, solve.keeps_trajectory, ready=solve)
        if solve.keeps_trajectory:
            outputs = solution(call, tensors)
        else:
            with torch.no_grad():
                outputs = call.run(tensors)
        if settings.step_size is None and len(solve.times) == 2 and solve.control is None and settings.grid is None:
            _warn_if_step_is_too_long(solve, func, u0, t, settings, args, outputs)
    return layout.as_state(outputs), solve


def _warn_if_step_is_too_long(
    solve: Solve, func: Function, u0: State, t: Times, settings: Settings, args: tuple[Any, ...], outputs: Parts
) -> None:
    """Warn once if the step of a solve of one step is plainly too long. Collective."""
    if isinstance(func, WithTangent) or not is_first_of_its_kind(solve.solver, func):
        return
    comm, size = solve.solver.stepper.comm, abs(solve.times[1] - solve.times[0])
    halved = replace(settings, step_size=size / 2, last_only=True, fixed_plan=None)
    finer = finer_end(
        lambda: _solve(NoSolvers(), NoSolvers(), func, u0, t, halved, args)[0],
        func,
        args,
        comm,
    )
    if finer is not None:
        ends = outputs if settings.last_only else tuple(part[-1] for part in outputs)
        what = f"one step of {solve.solver.stepper.method.name!r} from t = {solve.times[0]:g} to {solve.times[1]:g}"
        warn_if_coarse(what, size, (ends, layout_of(finer)[1], solve.initial), comm)


def _transformed(
    solvers: KeptSolvers,
    tangent_solvers: KeptSolvers,
    func: Function,
    u0: State,
    t: Times,
    settings: Settings,
    args: tuple[Any, ...],
) -> tuple[Call, StateLayout, tuple[torch.Tensor, ...]]:
    """The solve under torch's transforms, see `transformed`."""
    ranks = communicator(settings.partition).size
    is_tuple = isinstance(u0, tuple | list)
    prepare = _preparation(solvers, tangent_solvers, t, settings, is_tuple, len(u0) if is_tuple else 1)
    params, dtype = tuple(settings.params or ()), settings.compute_dtype
    explicit = not methods.resolve(settings.method or "rk4").implicit
    folds = explicit and settings.control() is None and settings.partition is None and dtype is None
    random = settings.preserve_rng_state
    return transformed(func, u0, t, args, params, dtype, ranks, prepare, random, folds, settings.last_only)


def _preparation(
    solvers: KeptSolvers, tangent_solvers: KeptSolvers, t: Times, settings: Settings, is_tuple: bool, parts: int
) -> Prepare:
    """How solves with these times and settings, and those of their tangents, are prepared."""
    at = t.detach() if isinstance(t, torch.Tensor) else t

    def prepare(
        func: Function,
        state: Parts,
        times: torch.Tensor | None,
        args: tuple[Any, ...],
        first: Callable[[], Solve] | None,
    ) -> Solve:
        u0 = state if is_tuple or first is not None else state[0]
        when = at if times is None else times
        if first is None:
            return prepared(solvers, func, u0, when, settings, args)[0]
        levels = (len(state) // parts).bit_length() - 1
        chosen = settings_of_tangents(settings, without_tangents(func, levels), is_tuple, first, 2**levels)
        return prepared(tangent_solvers, func, u0, when, chosen, args)[0]

    return prepare


@overload
def odeint(
    func: Function,
    u0: torch.Tensor,
    t: Times,
    *,
    method: str | None = ...,
    step_size: float | None = ...,
    rtol: Tolerance | None = ...,
    atol: Tolerance | None = ...,
    adaptor: str = ...,
    partition: Partition | None = ...,
    trajectory: CheckpointBudget | None = ...,
    args: tuple[Any, ...] = ...,
    params: Sequence[torch.Tensor] | None = ...,
    options: PetscOptions | None = ...,
    mass: Mass | None = ...,
    preconditioner: Preconditioner | str | None = ...,
    compute_dtype: torch.dtype | None = ...,
    last_only: bool = ...,
    on_mismatch: str = ...,
    preserve_rng_state: bool = ...,
) -> torch.Tensor: ...


@overload
def odeint(
    func: Function,
    u0: tuple[torch.Tensor, ...],
    t: Times,
    *,
    method: str | None = ...,
    step_size: float | None = ...,
    rtol: Tolerance | None = ...,
    atol: Tolerance | None = ...,
    adaptor: str = ...,
    partition: Partition | None = ...,
    trajectory: CheckpointBudget | None = ...,
    args: tuple[Any, ...] = ...,
    params: Sequence[torch.Tensor] | None = ...,
    options: PetscOptions | None = ...,
    mass: Mass | None = ...,
    preconditioner: Preconditioner | str | None = ...,
    compute_dtype: torch.dtype | None = ...,
    last_only: bool = ...,
    on_mismatch: str = ...,
    preserve_rng_state: bool = ...,
) -> tuple[torch.Tensor, ...]: ...


@outside_graphs
def odeint(
    func: Function,
    u0: State,
    t: Times,
    *,
    method: str | None = None,
    step_size: float | None = None,
    rtol: Tolerance | None = None,
    atol: Tolerance | None = None,
    adaptor: str = "basic",
    partition: Partition | None = None,
    trajectory: CheckpointBudget | None = None,
    args: tuple[Any, ...] = (),
    params: Sequence[torch.Tensor] | None = None,
    options: PetscOptions | None = None,
    mass: Mass | None = None,
    preconditioner: Preconditioner | str | None = None,
    compute_dtype: torch.dtype | None = None,
    last_only: bool = False,
    on_mismatch: str = "raise",
    preserve_rng_state: bool = True,
) -> State:
    """Solve M du/dt = func(t, u, *args) from u(t[0]) = u0; differentiable in u0, in func's parameters and in t.

    Collective on the partition's communicator, and so is the backward pass.

    `func(t, u, *args)` gets a 0-dimensional tensor and this rank's part of the state, and returns du/dt in the same
    shape. It must be a function of these and of its parameters, because steps are recomputed for the gradient. For that
    the backward pass puts back what func read in the forward pass: parameters, buffers, attributes and the training
    mode of modules, variables of closures, globals, autocast, the default type, and with `preserve_rng_state` torch's
    random states at every recomputed segment. Tensors and attributes that func changes advance once, in the forward
    pass. A recomputed step that differs by more than rounding raises `RecomputationError`; `on_mismatch` "warn" or
    "ignore" goes on.

    `u0` is this rank's part of the initial state, a tensor or a tuple of tensors. `func` computes in its floating type
    unless `compute_dtype` names another one, while steps, checkpoints and adjoints are in PETSc's scalar type. With
    `compute_dtype` the parameters and buffers of modules, and tensors in `args`, are converted to it once for a solve,
    and keep their own type otherwise: so do their gradients, which are summed over steps in PETSc's scalar type. `u0`
    may be on another device: func then computes there. PETSc's vectors are there too if it is CUDA's, PETSc was built
    with CUDA and the method is explicit; otherwise states are copied back and forth.

    `t` holds the output times, strictly increasing or strictly decreasing. Every interval between them is divided into
    `ceil(|dt| / step_size)` equal steps of `method`, one step if `step_size` is None. With `rtol` or `atol` (by default
    1e-6 and 1e-9 beside the other one) steps are as long as the estimate of their error allows, controlled by PETSc's
    `adaptor` (see `ErrorControl`), and `step_size` is that of the first. Returns `[len(t), *u0.shape]`, for a tuple a
    tuple of such.

    `method` is one of `pnode_dist.ode.methods.METHODS`, by default `rk4`, and `dopri5` for steps with error control.
    Those of the families `theta`, `arkimex` and `dirk` solve equations in every step; with `arkimex` the parts of a
    `SplitFunction` are treated implicitly and explicitly. `mass` is a constant matrix M (see `mass_matrix`), which may
    be singular, for theta methods. `preconditioner` is that of the linear systems: `block`, `assembled`, or an object
    of `pnode_dist.ode.steppers.preconditioner`. `partition` says over which ranks the state is spread; None: this
    rank's state is its own. `trajectory` is the budget for checkpoints. `options` are PETSc options for the solver,
    such as `{"ts_monitor": None, "snes_rtol": 1e-10, "pc_type": "gamg"}`; one that nothing heeds is an error. With
    `last_only` the state at `t[-1]` alone is returned, in the shape of `u0`, and no memory is spent on the others.

    `func` may return memory that it uses again, at its next evaluation or later: such values are copied. Threads take
    turns, one forward or backward pass at a time. Where `t` has two times and neither `step_size` nor tolerances are
    given, a warning says if the one step is plainly too long; for that the first such solve evaluates `func` at two
    steps of half the size as well.

    The gradient is that of the numbers computed (a discrete adjoint: of the steps that were accepted, each taken as a
    fixed share of its interval), for the objective that is the sum of all ranks' losses. Gradients by parameters and
    times are this rank's contributions: `pnode_dist.distributed.gradients.parallel` sums those of parameters. `func`'s
    parameters are those of a module, and otherwise the tensors requiring a gradient that a function closes over,
    also in `args`; `params` adds those that cannot be found, and an error says when that is needed.

    Raises `ConfigurationError` for an unknown method, a gradient of a method without an adjoint, or a budget too small
    for one checkpoint, `ValueError` for times that are not monotone and for a du/dt of another shape, `TypeError` for a
    state or a du/dt that is not real floating-point tensors, `StepSizeError` where no step meets the tolerances,
    `ConvergenceError` where the equations of a step or of its adjoint are not solved, and `DisagreementError` where the
    ranks make different calls.
    """
    settings = Settings(
        method,
        step_size,
        rtol,
        atol,
        adaptor,
        partition,
        trajectory,
        params,
        options,
        mass,
        preconditioner,
        compute_dtype,
        last_only,
        on_mismatch,
        preserve_rng_state,
    )
    return _solve(NoSolvers(), NoSolvers(), func, u0, t, settings, args)[0]


_settings_of = attrgetter(*(field.name for field in fields(Settings) if field.name != "grid"))


class NeuralODE(nn.Module):
    """`odeint` of a right-hand side as a module that keeps its PETSc solver between calls.

    The arguments are those of `odeint`; `forward(u0, t, *args)` returns `[len(t), *u0.shape]`, or `u0.shape` with
    `last_only`. Attributes may be changed between calls. `last_solve` holds the counts of the last call, and after its
    backward pass those too; `last_plan` is what was kept of it, None without gradients or with error control. A
    `fixed_plan`, one of the candidates of `plan`, is followed instead of choosing one.

    With `compile` f and its vector-Jacobian products go through torch.compile, by its default backend or the one named
    (see `pnode_dist.ode.rhs.compiled`). That takes seconds at first, pays where f is made of many small operations on
    large states, and changes results by rounding.
    """

    def __init__(
        self,
        func: Function,
        *,
        method: str | None = None,
        step_size: float | None = None,
        rtol: Tolerance | None = None,
        atol: Tolerance | None = None,
        adaptor: str = "basic",
        partition: Partition | None = None,
        trajectory: CheckpointBudget | None = None,
        params: Sequence[torch.Tensor] | None = None,
        options: PetscOptions | None = None,
        mass: Mass | None = None,
        preconditioner: Preconditioner | str | None = None,
        compute_dtype: torch.dtype | None = None,
        last_only: bool = False,
        on_mismatch: str = "raise",
        preserve_rng_state: bool = True,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        if method is not None:
            methods.resolve(method)
        self.func = func
        self.method = method
        self.step_size = step_size
        self.rtol = rtol
        self.atol = atol
        self.adaptor = adaptor
        self.partition = partition
        self.trajectory = trajectory
        self.params = params
        self.options = options
        self.mass = mass
        self.preconditioner = preconditioner
        self.compute_dtype = compute_dtype
        self.last_only = last_only
        self.on_mismatch = on_mismatch
        self.preserve_rng_state = preserve_rng_state
        self.compiler = None if compile is False else Compiler("inductor" if compile is True else compile)
        self.last_solve = SolveStatistics()
        self.last_plan: Plan | None = None
        self.fixed_plan: Plan | None = None
        self._solvers = KeptSolvers()
        self._tangent_solvers = KeptSolvers()

    @overload
    def forward(self, u0: torch.Tensor, t: Times, *args: Any) -> torch.Tensor: ...

    @overload
    def forward(self, u0: tuple[torch.Tensor, ...], t: Times, *args: Any) -> tuple[torch.Tensor, ...]: ...

    @outside_graphs
    def forward(self, u0: State, t: Times, *args: Any) -> State:
        """The states at the times `t`, starting from `u0` at `t[0]`. Collective on the partition's communicator."""
        outputs, solve = _solve(self._solvers, self._tangent_solvers, self.func, u0, t, self._settings, args)
        self.last_solve, self.last_plan = solve.statistics, solve.plan
        return outputs

    @outside_graphs
    def jvp(
        self,
        u0: State,
        t: Times,
        u0_tangent: State,
        parameter_tangents: Mapping[torch.Tensor, torch.Tensor] | None = None,
        *args: Any,
    ) -> tuple[State, State]:
        """The states at the times `t`, and their derivatives along a direction in initial state and parameters.

        `u0_tangent` has the shape of `u0`; `parameter_tangents` maps parameters to tangents of theirs, those that are
        not in it stay as they are. Both results are differentiable. With error control the steps are those that a solve
        without tangent takes. Collective on the partition's communicator.
        """
        with preparation(communicator(self.partition)) as preparing:
            state, is_tuple = stacked(u0, u0_tangent)
            direction = checked_direction(parameter_tangents)
            preparing.later()
        if transforming():
            return self._transformed_jvp(u0, t, state[len(state) // 2 :], direction, args)

        def before() -> Solve:
            with torch.no_grad():
                return _solve(self._solvers, self._tangent_solvers, self.func, u0, t, self._settings, args)[1]

        settings = settings_of_tangents(self._settings, self.func, is_tuple, before, 2)
        every = independent(find_parameters(self.func, (*args, *(self.params or ()))))
        func = with_tangent(self.func, is_tuple, direction, every)
        outputs, solve = _solve(self._tangent_solvers, self._tangent_solvers, func, state, t, settings, args)
        self.last_solve, self.last_plan = solve.statistics, solve.plan
        half = len(state) // 2
        values, tangents = outputs[:half], outputs[half:]
        return (values, tangents) if is_tuple else (values[0], tangents[0])

    def _transformed_jvp(
        self,
        u0: State,
        t: Times,
        tangents: tuple[torch.Tensor, ...],
        direction: Mapping[torch.Tensor, torch.Tensor],
        args: tuple[Any, ...],
    ) -> tuple[State, State]:
        call, layout, tensors = _transformed(
            self._solvers, self._tangent_solvers, self.func, u0, t, self._settings, args
        )
        found = dict(zip(map(id, call.asked.parameters), range(call.parameters), strict=True))
        along: list[torch.Tensor | None] = [*tangents, *(None,) * (len(tensors) - len(tangents))]
        for parameter, tangent in direction.items():
            along[len(tangents) + found[id(parameter)]] = tangent
        tangent_call, inputs = tangent_call_of(call, tensors, along, True)
        tangent_call.repeats = False
        outputs = solution(tangent_call, inputs)
        solve = tangent_call.latest()
        self.last_solve, self.last_plan = solve.statistics, solve.plan
        half = len(outputs) // 2
        return layout.as_state(outputs[:half]), layout.as_state(outputs[half:])

    def plan(self, u0: State, t: Times, *args: Any) -> Plans:
        """What the trajectory's budget allows for this solve, with predicted times, and what would be chosen.

        Measures the first step and checkpoints of this problem first. Collective on the partition's communicator.
        Raises `ValueError` for steps with error control, whose number is not known before they are taken.
        """
        if transforming():
            raise ConfigurationError("plan: not available under torch's transforms or in forward mode: call it before")
        with solve_lock():
            solve, layout, tensors = prepared(self._solvers, self.func, u0, t, self._settings, args, "plan")
            if solve.control is not None:
                raise ValueError("steps with error control (rtol, atol) cannot be planned: their number is not known")
            if solve.solver.stepper.method.adjoint == "none":
                raise ConfigurationError(methods.gradient_refusal(solve.solver.stepper.method))
            with torch.no_grad(), solve.bound.copies.in_place():
                return measured_plans(solve, tensors[: len(layout.shapes)])

    @property
    def _settings(self) -> Settings:
        return Settings(*_settings_of(self))

    def extra_repr(self) -> str:
        """Settings, for printing."""
        control = "" if self.rtol is None and self.atol is None else f", rtol={self.rtol}, atol={self.atol}"
        return f"method={self.method!r}, step_size={self.step_size}{control}"
