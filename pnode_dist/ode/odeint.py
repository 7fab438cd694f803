"""`odeint` and `NeuralODE`: a solve as one differentiable operation.

C. Zhang, W. Zhao: A memory-efficient neural ordinary differential equation framework based on high-level adjoint
differentiation, IEEE Trans. Artif. Intell. (2022), arXiv 2206.01298 (PNODE): the adjoint of the time integration is
discrete and exact, only f itself is differentiated by the automatic tool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any, overload

import torch
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import methods
from pnode_dist.ode.bindings import Bindings
from pnode_dist.ode.call import Asked, Call, Prepare
from pnode_dist.ode.call_agreement import Alone, Preparation, facts, preparation
from pnode_dist.ode.carried import NOTHING_CARRIED, Carried, KnownTensors
from pnode_dist.ode.compiled import Compiler
from pnode_dist.ode.compute_type import ComputeCopies, compute_copies
from pnode_dist.ode.differentiable import solution, tangent_call_of
from pnode_dist.ode.evaluation import Function, Problem
from pnode_dist.ode.fully_sharded import refuse_fully_sharded
from pnode_dist.ode.given_options import check_options, without_adaptation
from pnode_dist.ode.guard import check_policy
from pnode_dist.ode.layout import Parts, State, StateLayout, layout_of
from pnode_dist.ode.mass import Mass, mass_matrix
from pnode_dist.ode.one_at_a_time import one_at_a_time
from pnode_dist.ode.outside_graphs import outside_graphs
from pnode_dist.ode.parameters import find_parameters, independent
from pnode_dist.ode.preconditioner import Preconditioner
from pnode_dist.ode.preconditioner import resolve as resolve_preconditioner
from pnode_dist.ode.solve import Solve
from pnode_dist.ode.solver import Solver, communicator
from pnode_dist.ode.solver_key import Same, contents_of, object_key
from pnode_dist.ode.split import MatrixFunction, SplitFunction
from pnode_dist.ode.stepper import PetscOptions
from pnode_dist.ode.surroundings import Surroundings
from pnode_dist.ode.tangent import checked_direction, in_compute_type, joined, with_tangent
from pnode_dist.ode.time_grid import TimeGrid, check_step_size, divided, output_times
from pnode_dist.ode.tolerances import DEFAULT_ATOL, DEFAULT_RTOL, ErrorControl, Tolerance, check_shapes
from pnode_dist.ode.transformed import transformed
from pnode_dist.ode.transforms import transforming
from pnode_dist.partition.protocol import Partition, vec_device
from pnode_dist.trajectory import budget
from pnode_dist.trajectory.budget import Trajectory, slot_bounds
from pnode_dist.trajectory.plan import Plan, Plans
from pnode_dist.trajectory.statistics import SolveStatistics

Times = torch.Tensor | Sequence[float]
_KEPT_SOLVERS = 8


class _Solvers:
    """The solvers that a `NeuralODE` keeps between calls, least recently used ones dropped. Collective."""

    def __init__(self) -> None:
        self._solvers: OrderedDict[Any, Solver] = OrderedDict()

    def __reduce__(self) -> tuple[type[_Solvers], tuple[()]]:
        # Copies and pickles of a module make solvers of their own.
        return _Solvers, ()

    def find(self, key: Any) -> Solver | None:
        """The solver of `key`, if there is one that a solve can use now."""
        solver = self._solvers.get(key)
        if solver is None or solver.stepper.stepping or solver.stepper.failed:
            return None
        return solver if solver.contents is None or solver.contents.are_the_same else None

    def get(self, key: Any, create: Callable[[], Solver], afresh: bool = False) -> Solver:
        """The solver of `key`, made if it is not there; one of its own for a solve inside a step of that solver.

        It is made anew where the contents of what it was made of have changed. Making one is collective: `afresh` says
        that another rank makes one, so that this one has to as well.
        """
        if key in self._solvers and self._solvers[key].stepper.stepping:
            return create()
        if afresh or self.find(key) is None:
            self._solvers[key] = solver = create()
            solver.kept = True
            if len(self._solvers) > _KEPT_SOLVERS:
                self._solvers.popitem(last=False)[1].drop()
        self._solvers.move_to_end(key)
        return self._solvers[key]


class _NoSolvers(_Solvers):
    """Keeps none: every solver is closed when its solve is done with it."""

    def get(self, key: Any, create: Callable[[], Solver], afresh: bool = False) -> Solver:
        """A solver of the solve's own."""
        return create()


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
    solvers: _Solvers,
    func: Function,
    u0: State,
    t: Times,
    settings: _Settings,
    args: tuple[Any, ...],
    kind: str = "solve",
) -> tuple[Solve, StateLayout, tuple[torch.Tensor, ...]]:
    """The solve that is asked for, the layout of its state, and the tensors it depends on: state parts, parameters.

    Collective on the partition's communicator: what is wrong on one rank, or differs between them, all of them raise.
    """
    with preparation(communicator(settings.partition), kind) as preparing:
        return _prepared_with(preparing, solvers, func, u0, t, settings, args)


def _prepared_with(
    preparing: Preparation | Alone,
    solvers: _Solvers,
    func: Function,
    u0: State,
    t: Times,
    settings: _Settings,
    args: tuple[Any, ...],
) -> tuple[Solve, StateLayout, tuple[torch.Tensor, ...]]:
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
    check_options(settings.options, table.family, control is not None)
    options = dict(settings.options or {})
    by_times = isinstance(t, torch.Tensor) and t.requires_grad and torch.is_grad_enabled()
    # The times are parameters as well: of each step, its size and its start.
    sizes = (*sizes, 1, 1) if by_times else sizes
    tensors = (*parts, *parameters.tensors, *((t,) if by_times else ()))
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not callable(func):
        raise TypeError(f"func must be callable as func(t, u), got {type(func).__name__}")
    if needs_gradient:
        refuse_fully_sharded(func, args, parameters.tensors)
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
    made_of = object_key(func, mass, preconditioner)
    key = (Same(partition), layout, table, sizes, repr(options), trajectory, Same(trajectory.ledger), *made_of)

    def create() -> Solver:
        made = Solver.create(partition, layout, table, sizes, options, trajectory, mass, preconditioner, linear)
        # What works for PETSc itself changes as it does.
        works = getattr(made.stepper, "built", None) is preconditioner
        made.contents = contents_of(func, mass, None if works else preconditioner)
        return made

    agreed = None
    if isinstance(preparing, Preparation):
        known = solvers.find(key)
        # What would be found later is looked for while the other ranks still hear of it.
        if isinstance(mass, torch.Tensor | tuple | list):
            mass_matrix(mass, layout)
        if control is not None:
            check_shapes(control, layout)
        steps = 0 if len(times) == 1 else None if grid is None else grid.steps
        agreed = preparing.agree(
            facts(settings, table, layout, times, func, needs_gradient, by_times),
            known is None,
            slot_bounds(
                trajectory,
                layout.size * trajectory.checkpoint_itemsize,
                steps,
                needs_gradient,
                known is not None and known.disk_is_lost,
            ),
        )
    solver = solvers.get(
        key,
        create,
        afresh=agreed is not None and agreed.creates,
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
        agreed,
    )
    return solve, layout, tensors


def _usable(value: Any) -> Any:
    """A tensor of inference mode, or a tuple of such, as copies that derivatives can be taken with."""
    if isinstance(value, tuple | list):
        return tuple(map(_usable, value))
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


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
    solvers: _Solvers,
    tangent_solvers: _Solvers,
    func: Function,
    u0: State,
    t: Times,
    settings: _Settings,
    args: tuple[Any, ...],
) -> tuple[State, Solve]:
    if torch.is_inference_mode_enabled() and methods.resolve(settings.method or "rk4").implicit:
        # Newton's method needs derivatives of f, which inference mode does not allow.
        with torch.inference_mode(False), torch.no_grad():
            usable = tuple(map(_usable, args))
            return _solve(solvers, tangent_solvers, func, _usable(u0), t, settings, usable)
    with one_at_a_time():
        if transforming():
            call, layout, tensors = _transformed(solvers, tangent_solvers, func, u0, t, settings, args)
            return layout.as_state(solution(call, tensors)), call.latest()
        solve, layout, tensors = _prepared(solvers, func, u0, t, settings, args)
        prepare = _preparation(solvers, tangent_solvers, t, settings, layout.is_tuple)
        asked = Asked(
            func,
            args,
            len(layout.shapes),
            layout.is_tuple,
            solve.parameters,
            solve.problem.by_times,
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
    return layout.as_state(outputs), solve


def _transformed(
    solvers: _Solvers,
    tangent_solvers: _Solvers,
    func: Function,
    u0: State,
    t: Times,
    settings: _Settings,
    args: tuple[Any, ...],
) -> tuple[Call, StateLayout, tuple[torch.Tensor, ...]]:
    """The solve under torch's transforms, see `transformed`."""
    ranks = communicator(settings.partition).size
    prepare = _preparation(solvers, tangent_solvers, t, settings, isinstance(u0, tuple | list))
    params, dtype = tuple(settings.params or ()), settings.compute_dtype
    return transformed(func, u0, t, args, params, dtype, ranks, prepare, settings.preserve_rng_state)


def _preparation(
    solvers: _Solvers, tangent_solvers: _Solvers, t: Times, settings: _Settings, is_tuple: bool
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
            return _prepared(solvers, func, u0, when, settings, args)[0]
        chosen = _settings_of_tangents(settings, is_tuple, first, len(state))
        return _prepared(tangent_solvers, func, u0, when, chosen, args)[0]

    return prepare


def _settings_of_tangents(settings: _Settings, is_tuple: bool, before: Callable[[], Solve], parts: int) -> _Settings:
    """The settings of a solve of tangents with so many parts; `before` runs the one without tangents.

    With error control the steps that were accepted there are taken again.
    """
    if settings.control() is not None:
        solve = before()
        # Without error control another method would be the default.
        name = solve.solver.stepper.method.name
        options = without_adaptation(settings.options)
        settings = replace(settings, rtol=None, atol=None, grid=solve.grid, method=name, options=options)
    if settings.mass is not None:
        masses = tuple(settings.mass) if is_tuple else (settings.mass,)
        settings = replace(settings, mass=masses * (parts // len(masses)))
    # Tangents are derivatives of vector-Jacobian products, which compiled code does not have. Their plan is another.
    return replace(settings, compiler=None, fixed_plan=None)


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
    return _solve(_NoSolvers(), _NoSolvers(), func, u0, t, settings, args)[0]


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
            state, is_tuple = joined(u0, u0_tangent)
            direction = checked_direction(parameter_tangents)
            preparing.later()
        if transforming():
            return self._transformed_jvp(u0, t, state[len(state) // 2 :], direction, args)

        def before() -> Solve:
            with torch.no_grad():
                return _solve(self._solvers, self._tangent_solvers, self.func, u0, t, self._settings, args)[1]

        settings = _settings_of_tangents(self._settings, is_tuple, before, len(state))
        func = with_tangent(self.func, is_tuple, direction)
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
        with one_at_a_time():
            solve, layout, tensors = _prepared(self._solvers, self.func, u0, t, self._settings, args, "plan")
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
