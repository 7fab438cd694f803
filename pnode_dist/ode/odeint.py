"""`odeint` and `NeuralODE`: a solve as one differentiable operation.

C. Zhang, W. Zhao: A memory-efficient neural ordinary differential equation framework based on high-level adjoint
differentiation, IEEE Trans. Artif. Intell. (2022), arXiv 2206.01298 (PNODE): the adjoint of the time integration is
discrete and exact, only f itself is differentiated by the automatic tool.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any, overload

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import methods
from pnode_dist.ode.bindings import Bindings
from pnode_dist.ode.carried import NOTHING_CARRIED, Carried, KnownTensors
from pnode_dist.ode.compiled import Compiler
from pnode_dist.ode.compute_type import ComputeCopies, compute_copies
from pnode_dist.ode.evaluation import Function, Problem
from pnode_dist.ode.guard import check_policy
from pnode_dist.ode.layout import Parts, State, StateLayout, layout_of
from pnode_dist.ode.mass import Mass
from pnode_dist.ode.parameters import find_parameters, independent
from pnode_dist.ode.preconditioner import Preconditioner
from pnode_dist.ode.preconditioner import resolve as resolve_preconditioner
from pnode_dist.ode.solve import Solve
from pnode_dist.ode.solver import Solver
from pnode_dist.ode.split import MatrixFunction, SplitFunction
from pnode_dist.ode.stepper import PetscOptions
from pnode_dist.ode.surroundings import Surroundings, uncached_casts
from pnode_dist.ode.tangent import checked_direction, in_compute_type, joined, with_tangent
from pnode_dist.ode.time_grid import TimeGrid, check_step_size, divided, output_times
from pnode_dist.ode.tolerances import DEFAULT_ATOL, DEFAULT_RTOL, ErrorControl, Tolerance
from pnode_dist.partition.protocol import Partition, vec_device
from pnode_dist.trajectory import budget
from pnode_dist.trajectory.budget import Trajectory
from pnode_dist.trajectory.plan import Plan, Plans
from pnode_dist.trajectory.statistics import SolveStatistics

Times = torch.Tensor | Sequence[float]
_KEPT_SOLVERS = 8


@contextmanager
def _running(solve: Solve, backward: bool = False) -> Iterator[None]:
    """While f is evaluated: its modules hold what it computes with, in a backward pass what it saw in the forward pass.

    A solve that fails gives back what it holds.
    """
    surroundings = solve.surroundings
    try:
        with ExitStack() as stack:
            if backward and surroundings is not None:
                stack.enter_context(surroundings.restored())
            if surroundings is not None and surroundings.autocast.on:
                stack.enter_context(uncached_casts())
            stack.enter_context(solve.problem.copies.in_place(writes_back=not backward))
            if backward:
                stack.enter_context(solve.carried.backward_pass())
            yield
    except BaseException:
        # Whoever keeps the error keeps the solve alive.
        solve.release()
        raise


class _Differentiable(torch.autograd.Function):
    """The solve as a node of torch's graph: state parts first, then parameters, then the evaluation times if asked."""

    @staticmethod
    def forward(ctx: Any, solve: Solve, parts: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.solve, ctx.parts, ctx.reversed = solve, parts, False
        ctx.set_materialize_grads(False)
        # Not only for a second backward pass: torch now notices when they are changed in place before the first.
        ctx.save_for_backward(*tensors)
        # A graph that is dropped without a backward pass gives its checkpoints back.
        weakref.finalize(ctx, solve.release).atexit = False
        with _running(solve):
            outputs = solve.forward(tensors[:parts])
        if solve.surroundings is not None:
            solve.surroundings.end_forward()
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:
        solve, tensors = ctx.solve, ctx.saved_tensors
        with _running(solve, backward=True):
            if ctx.reversed:
                # The checkpoints went as they were used: lay the trajectory down again.
                solve.carried.restart()
                solve.forward(tensors[: ctx.parts])
            ctx.reversed = True
            states, parameters, times = solve.backward(cotangents)
        return None, None, *states, *parameters, *times


class _Solvers:
    """The solvers that a `NeuralODE` keeps between calls, least recently used ones dropped."""

    def __init__(self) -> None:
        self._solvers: OrderedDict[Any, Solver] = OrderedDict()

    def __reduce__(self) -> tuple[type[_Solvers], tuple[()]]:
        # Copies and pickles of a module make solvers of their own.
        return _Solvers, ()

    def get(self, key: Any, create: Callable[[], Solver]) -> Solver:
        """The solver of `key`, made if it is not there; one of its own for a solve inside a step of that solver."""
        if key in self._solvers and self._solvers[key].stepper.stepping:
            return create()
        if key not in self._solvers or self._solvers[key].stepper.failed:
            self._solvers[key] = create()
            if len(self._solvers) > _KEPT_SOLVERS:
                self._solvers.popitem(last=False)
        self._solvers.move_to_end(key)
        return self._solvers[key]


@dataclass(frozen=True)
class _Settings:
    """What `odeint` takes by keyword and `NeuralODE` keeps."""

    method: str | None
    step_size: float | None
    rtol: Tolerance | None
    atol: Tolerance | None
    adaptor: str
    partition: Partition | None
    trajectory: Trajectory | None
    params: Sequence[torch.Tensor] | None
    options: PetscOptions | None
    mass: Mass | None = None
    preconditioner: Preconditioner | str | None = None
    compute_dtype: torch.dtype | None = None
    last_only: bool = False
    on_mismatch: str = "raise"
    preserve_rng_state: bool = True
    fixed_plan: Plan | None = None
    compiler: Compiler | None = None
    grid: TimeGrid | None = None

    def control(self) -> ErrorControl | None:
        """The error control, None for steps of fixed size."""
        if self.rtol is None and self.atol is None:
            return None
        rtol = DEFAULT_RTOL if self.rtol is None else self.rtol
        atol = DEFAULT_ATOL if self.atol is None else self.atol
        return ErrorControl(rtol, atol, self.adaptor, self.step_size)


_settings_of = attrgetter(*(field.name for field in fields(_Settings) if field.name != "grid"))


def _prepared(
    solvers: _Solvers, func: Function, u0: State, t: Times, settings: _Settings, args: tuple[Any, ...]
) -> tuple[Solve, StateLayout, tuple[torch.Tensor, ...]]:
    """The solve that is asked for, the layout of its state, and the tensors it depends on: state parts, parameters."""
    layout, parts = layout_of(u0, settings.compute_dtype)
    times = output_times(t)
    check_step_size(settings.step_size)
    check_policy(settings.on_mismatch)
    control = settings.control()
    grid = settings.grid
    if grid is None and control is None:
        grid = divided(times, settings.step_size)
    if control is not None and settings.fixed_plan is not None:
        raise ConfigurationError("fixed_plan: steps with error control (rtol, atol) cannot be planned")
    table = methods.resolve(settings.method or ("rk4" if control is None else "dopri5"))
    if not table.implicit and (device := vec_device(layout.device)) != layout.vec_device:
        layout = replace(layout, vec_device=device)
    partition = settings.partition
    trajectory = settings.trajectory or budget.DEFAULT
    parameters = independent(find_parameters(func, (*args, *(settings.params or ()))))
    sizes = tuple(parameter.numel() for parameter in parameters.tensors)
    options = dict(settings.options or {})
    by_times = isinstance(t, torch.Tensor) and t.requires_grad and torch.is_grad_enabled()
    # The times are parameters as well: of each step, its size and its start.
    sizes = (*sizes, 1, 1) if by_times else sizes
    tensors = (*parts, *parameters.tensors, *((t,) if by_times else ()))
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not callable(func):
        raise TypeError(f"func must be callable as func(t, u), got {type(func).__name__}")
    if needs_gradient and table.adjoint == "none":
        raise ConfigurationError(methods.gradient_refusal(table))
    if settings.mass is not None and not table.implicit:
        raise ConfigurationError(
            f"mass: method = {table.name!r} is explicit and takes no mass matrix: must be one of beuler, cn, theta"
        )
    copies = ComputeCopies({}, (), args)
    if settings.compute_dtype is not None:
        copies = compute_copies(func, args, layout.compute_dtype)
    mass, preconditioner = settings.mass, resolve_preconditioner(settings.preconditioner)
    if not table.implicit and preconditioner is not None:
        raise ConfigurationError(
            f"preconditioner: method = {table.name!r} is explicit and solves no equations: must be None or 'none'"
        )
    linear = _matrix_part(func, table)
    solver = solvers.get(
        (
            *(id(partition), layout, table, sizes, repr(options), trajectory, id(trajectory.ledger)),
            *(id(mass), preconditioner, id(linear)),
        ),
        lambda: Solver.create(partition, layout, table, sizes, options, trajectory, mass, preconditioner, linear),
    )
    surroundings, carried = None, NOTHING_CARRIED
    if needs_gradient:
        surroundings = Surroundings.now(func, args, layout.device)
        carried = _carried(surroundings.bindings, parameters.tensors, copies, layout, settings, solver.known)
    problem = Problem(
        in_compute_type(func, copies),
        copies.args,
        replace(parameters, tensors=copies.of(parameters.tensors)) if copies.by_original else parameters,
        copies,
        {} if settings.compiler is None else settings.compiler.compiled(func, table),
        watched=torch.is_grad_enabled() and not needs_gradient,
        by_times=by_times,
        looks=solver.looks_again(),
        carried=carried,
    )
    time_dtype = t.dtype if isinstance(t, torch.Tensor) else torch.float64
    solve = Solve(
        solver,
        times,
        grid,
        control,
        problem,
        parameters.tensors,
        SolveStatistics(),
        needs_gradient,
        settings.fixed_plan,
        time_dtype,
        settings.last_only,
        surroundings,
        settings.on_mismatch,
    )
    return solve, layout, tensors


def _carried(
    bindings: Bindings,
    parameters: Parts,
    copies: ComputeCopies,
    layout: StateLayout,
    settings: _Settings,
    known: KnownTensors,
) -> Carried:
    """The state that the right-hand side with these names carries, at the beginning of a solve."""
    inputs, buffers = set(map(id, parameters)), bindings.buffers
    tensors = [tensor for tensor in bindings.tensors if id(tensor) not in inputs]
    seen = zip(copies.of(tensors), (id(tensor) in buffers for tensor in tensors), strict=True)
    return Carried(bindings, seen, layout.device, settings.preserve_rng_state, known)


def _matrix_part(func: Function, method: methods.Method) -> MatrixFunction | None:
    """The Mat that is all of what the method treats implicitly, if there is one."""
    if not method.implicit:
        return None
    part = func.implicit if isinstance(func, SplitFunction) and method.family == "arkimex" else func
    return part if isinstance(part, MatrixFunction) else None


def _solve(
    solvers: _Solvers, func: Function, u0: State, t: Times, settings: _Settings, args: tuple[Any, ...]
) -> tuple[State, Solve]:
    solve, layout, tensors = _prepared(solvers, func, u0, t, settings, args)
    parts = len(layout.shapes)
    if solve.keeps_trajectory:
        outputs = _Differentiable.apply(solve, parts, *tensors)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad(), _running(solve):
            outputs = solve.forward(tensors[:parts])
    return layout.as_state(outputs), solve


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
    trajectory: Trajectory | None = ...,
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
    trajectory: Trajectory | None = ...,
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
    trajectory: Trajectory | None = None,
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
    shape. It must be deterministic: parts of the solve are run again for the gradient. `u0` is this rank's part of the
    initial state, a tensor or a tuple of tensors; `func` computes in its floating type unless `compute_dtype` names
    another one, while steps, checkpoints and adjoints are in PETSc's scalar type. With `compute_dtype` the parameters
    and buffers of modules, and tensors in `args`, are converted to it once for a solve, and keep their own type
    otherwise: so do their gradients, which are summed over steps in PETSc's scalar type. `u0` may be on another
    device: func then computes there. PETSc's vectors are there too if it is CUDA's, PETSc was built with CUDA and the
    method is explicit; otherwise states are copied back and forth.

    `t` holds the output times, strictly increasing or strictly decreasing. Every interval between them is divided into
    `ceil(|dt| / step_size)` equal steps of `method`, one step if `step_size` is None. With `rtol` or `atol` (by default
    1e-6 and 1e-9 beside the other one) steps are as long as the estimate of their error allows, controlled by PETSc's
    `adaptor` (see `ErrorControl`), and `step_size` is that of the first. Returns `[len(t), *u0.shape]`, for a tuple a
    tuple of such.

    `method` is one of `pnode_dist.ode.methods.METHODS`, by default `rk4`, and `dopri5` for steps with error control.
    Those of the families `theta`, `arkimex` and `dirk` solve equations in every step; with `arkimex` the parts of a
    `SplitFunction` are treated implicitly and explicitly. `mass` is a constant matrix M (see `mass_matrix`), which may
    be singular, for theta methods. `preconditioner` is that of the linear systems: `block`, `assembled`, or an object
    of `pnode_dist.ode.preconditioner`. `partition` says over which ranks the state is spread; None: this rank's state
    is its own. `trajectory` is the budget for checkpoints. `options` are PETSc options for the solver, such as
    `{"ts_monitor": None, "snes_rtol": 1e-10, "pc_type": "gamg"}`. With `last_only` the state at `t[-1]` alone is
    returned, in the shape of `u0`, and no memory is spent on the others.

    The gradient is that of the numbers computed (a discrete adjoint: of the steps that were accepted, each taken as a
    fixed share of its interval), for the objective that is the sum of all ranks' losses. Gradients by parameters and
    times are this rank's contributions: `pnode_dist.sync.parallel` sums those of parameters. `func`'s
    parameters are those of a module, and otherwise the tensors requiring a gradient that a function closes over,
    also in `args`; `params` adds those that cannot be found, and an error says when that is needed.

    Raises `ConfigurationError` for an unknown method, a gradient of a method without an adjoint, or a budget too small
    for one checkpoint, `ValueError` for times that are not monotone and for a du/dt of another shape, `TypeError` for a
    state that is not real floating-point tensors, `StepSizeError` where no step meets the tolerances, and
    `ConvergenceError` where the equations of a step or of its adjoint are not solved.
    """
    settings = _Settings(
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
    return _solve(_Solvers(), func, u0, t, settings, args)[0]


class NeuralODE(nn.Module):
    """`odeint` of a right-hand side as a module that keeps its PETSc solver between calls.

    The arguments are those of `odeint`; `forward(u0, t, *args)` returns `[len(t), *u0.shape]`, or `u0.shape` with
    `last_only`. Attributes may be changed between calls. `last_solve` holds the counts of the last call, and after its
    backward pass those too; `last_plan` is what was kept of it, None without gradients or with error control. A
    `fixed_plan`, one of the candidates of `plan`, is followed instead of choosing one.

    With `compile` f and its vector-Jacobian products go through torch.compile, by its default backend or the one named
    (see `pnode_dist.ode.compiled`). That takes seconds at first, pays where f is made of many small operations on large
    states, and changes results by rounding.
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
        trajectory: Trajectory | None = None,
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
        self._solvers = _Solvers()
        self._tangent_solvers = _Solvers()

    @overload
    def forward(self, u0: torch.Tensor, t: Times, *args: Any) -> torch.Tensor: ...

    @overload
    def forward(self, u0: tuple[torch.Tensor, ...], t: Times, *args: Any) -> tuple[torch.Tensor, ...]: ...

    def forward(self, u0: State, t: Times, *args: Any) -> State:
        """The states at the times `t`, starting from `u0` at `t[0]`. Collective on the partition's communicator."""
        outputs, solve = _solve(self._solvers, self.func, u0, t, self._settings, args)
        self.last_solve, self.last_plan = solve.statistics, solve.plan
        return outputs

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
        settings = self._settings
        state, is_tuple = joined(u0, u0_tangent)
        direction = checked_direction(parameter_tangents)
        if settings.control() is not None:
            with torch.no_grad():
                _, before = _solve(self._solvers, self.func, u0, t, settings, args)
            settings = replace(settings, rtol=None, atol=None, grid=before.grid)
            # Without error control another method would be the default.
            settings = replace(settings, method=before.solver.stepper.method.name)
        if settings.mass is not None:
            masses = tuple(settings.mass) if is_tuple else (settings.mass,)
            settings = replace(settings, mass=(*masses, *masses))
        # Tangents are derivatives of vector-Jacobian products, which compiled code does not have.
        settings = replace(settings, compiler=None)
        func = with_tangent(self.func, is_tuple, direction)
        outputs, solve = _solve(self._tangent_solvers, func, state, t, settings, args)
        self.last_solve, self.last_plan = solve.statistics, solve.plan
        half = len(state) // 2
        values, tangents = outputs[:half], outputs[half:]
        return (values, tangents) if is_tuple else (values[0], tangents[0])

    def plan(self, u0: State, t: Times, *args: Any) -> Plans:
        """What the trajectory's budget allows for this solve, with predicted times, and what would be chosen.

        Measures the first step and checkpoints of this problem first. Collective on the partition's communicator.
        Raises `ValueError` for steps with error control, whose number is not known before they are taken.
        """
        solve, layout, tensors = _prepared(self._solvers, self.func, u0, t, self._settings, args)
        if solve.control is not None:
            raise ValueError("steps with error control (rtol, atol) cannot be planned: their number is not known")
        if solve.solver.stepper.method.adjoint == "none":
            raise ConfigurationError(methods.gradient_refusal(solve.solver.stepper.method))
        with torch.no_grad(), solve.problem.copies.in_place():
            return solve.measured_plans(tensors[: len(layout.shapes)])

    @property
    def _settings(self) -> _Settings:
        return _Settings(*_settings_of(self))

    def extra_repr(self) -> str:
        """Settings, for printing."""
        control = "" if self.rtol is None and self.atol is None else f", rtol={self.rtol}, atol={self.atol}"
        return f"method={self.method!r}, step_size={self.step_size}{control}"
