"""The preparation of a solve: check its arguments, find its solver, and capture the inputs of f."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pnode_dist.checkpointing import budget
from pnode_dist.checkpointing.budget import CheckpointBudget, slot_bounds
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.errors import ConfigurationError, StepSizeError
from pnode_dist.ode import methods
from pnode_dist.ode.call_agreement import Alone, Preparation, facts, preparation
from pnode_dist.ode.given_options import check_options, without_adaptation
from pnode_dist.ode.jumps import check_times_off_jumps, checked_jumps
from pnode_dist.ode.kept_solvers import KeptSolvers
from pnode_dist.ode.newton_choice import chosen_newton
from pnode_dist.ode.recomputation.bindings import Bindings
from pnode_dist.ode.recomputation.carried import NOTHING_CARRIED, Carried, KnownTensors
from pnode_dist.ode.recomputation.guard import check_policy
from pnode_dist.ode.recomputation.surroundings import Surroundings
from pnode_dist.ode.repeated import Repeated, split_options
from pnode_dist.ode.rhs.between import check_one_step
from pnode_dist.ode.rhs.compute_dtype import ComputeCopies, compute_copies
from pnode_dist.ode.rhs.evaluation import BoundFunction, Function
from pnode_dist.ode.rhs.fully_sharded import refuse_fully_sharded
from pnode_dist.ode.rhs.layout import Parts, State, StateLayout, for_method, layout_of
from pnode_dist.ode.rhs.mass import mass_matrix
from pnode_dist.ode.rhs.observed import between_of, cost_of, in_form_of, separated
from pnode_dist.ode.rhs.parameters import find_parameters, independent, real_numbers
from pnode_dist.ode.rhs.separable import check_pairs
from pnode_dist.ode.rhs.split import MatrixFunction, SplitFunction
from pnode_dist.ode.rhs.tangent import WithTangent, in_compute_type
from pnode_dist.ode.settings import CallSettings, Times, without_control
from pnode_dist.ode.solve import Solve
from pnode_dist.ode.solver import Solver, communicator
from pnode_dist.ode.solver_key import Same, contents_of, object_key
from pnode_dist.ode.steppers.preconditioner import BlockInverse
from pnode_dist.ode.steppers.preconditioner import resolve as resolve_preconditioner
from pnode_dist.ode.steppers.tolerances import check_shapes
from pnode_dist.ode.time_grid import check_step_size, divided, output_times
from pnode_dist.ode.time_rounding import DOUBLE, rounding_of
from pnode_dist.system.torch_internals import TRACES_OBJECTS


def prepared(
    solvers: KeptSolvers,
    func: Function,
    u0: State,
    t: Times,
    settings: CallSettings,
    args: tuple[Any, ...],
    kind: str = "solve",
) -> tuple[Solve, StateLayout, tuple[torch.Tensor, ...]]:
    """Return the solve, the layout of its state, and its differentiable inputs: state parts, parameters, times.

    Collective on the partition's communicator. An error on one rank, or a difference between ranks, is raised on all.
    """
    with preparation(communicator(settings.partition), kind) as preparing:
        return _prepared_with(preparing, solvers, func, u0, t, settings, args)


def _prepared_with(
    preparing: Preparation | Alone,
    solvers: KeptSolvers,
    func: Function,
    u0: State,
    t: Times,
    settings: CallSettings,
    args: tuple[Any, ...],
) -> tuple[Solve, StateLayout, tuple[torch.Tensor, ...]]:
    whole = func
    func, observe = separated(whole)
    between = between_of(whole)
    layout, parts = layout_of(u0, settings.compute_dtype)
    times = output_times(t)
    check_step_size(settings.step_size)
    check_policy(settings.on_mismatch)
    control = settings.control()
    jumps = checked_jumps(settings.jumps)
    grid = settings.grid
    if grid is None and control is None:
        step_size = settings.step_size
        rounding = DOUBLE if step_size is None else rounding_of(t, times)
        grid = divided(times, step_size, rounding, jumps)
        if settings.max_steps is not None and grid.steps > settings.max_steps:
            raise StepSizeError(f"max_steps = {settings.max_steps}: t and step_size make {grid.steps} steps")
    if control is not None and settings.fixed_plan is not None:
        raise ConfigurationError("fixed_plan: steps with error control (rtol, atol) cannot be planned")
    table = methods.resolve(settings.method or ("rk4" if control is None else "dopri5"))
    check_pairs(layout, table, isinstance(func, WithTangent))
    if between is not None:
        check_one_step(table)
    layout = for_method(layout, table, settings.state_dtype)
    partition = settings.partition
    trajectory = budget.DEFAULT if settings.trajectory is None else settings.trajectory
    if not isinstance(trajectory, CheckpointBudget):
        raise ConfigurationError(f"trajectory = {trajectory!r}: must be a pnode_dist.Trajectory, or None")
    parameters = independent(find_parameters(whole, (*args, *(settings.params or ()))))
    sizes = tuple(map(real_numbers, parameters.tensors))
    check_options(settings.options, table.family, control is not None)
    options = dict(settings.options or {})
    needs_time_gradient = isinstance(t, torch.Tensor) and t.requires_grad and torch.is_grad_enabled()
    if needs_time_gradient:
        check_times_off_jumps(times, jumps)
    # The gradient with respect to times needs two more parameters: the size and the start of a step.
    sizes = (*sizes, 1, 1) if needs_time_gradient else sizes
    tensors = (*parts, *parameters.tensors, *((t,) if needs_time_gradient else ()))
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not callable(func):
        raise TypeError(f"func must be callable as func(t, u), got {type(func).__name__}")
    if needs_gradient and settings.on_output is not None:
        raise ConfigurationError(
            "on_output: the outputs are not kept, so there is no gradient: must be None, or solve under torch.no_grad()"
        )
    if needs_gradient:
        refuse_fully_sharded(func, args, parameters.tensors)
    adaptive, preconditioner = control is not None, resolve_preconditioner(settings.preconditioner)
    newton = chosen_newton(
        settings.newton, table, layout, partition, func, settings.mass, preconditioner, options, adaptive
    )
    if needs_gradient and newton == "petsc" and (refusal := methods.gradient_refusal(table)):
        raise ConfigurationError(refusal)
    if settings.mass is not None and not table.implicit:
        raise ConfigurationError(
            f"mass: method = {table.name!r} is explicit and takes no mass matrix: must be one of {methods.TAKE_MASS}"
        )
    copies = ComputeCopies({}, (), args)
    if settings.compute_dtype is not None:
        copies = compute_copies(func, args, layout.compute_dtype)
    if settings.compiler is not None and settings.compiler.automatic and table.implicit and newton == "petsc":
        settings = replace(settings, compiler=None)  # It can hardly be compiled.
    mass, only_batch = settings.mass, settings.newton == "batch"
    if not table.implicit and preconditioner is not None:
        raise ConfigurationError(
            f"preconditioner: method = {table.name!r} is explicit and solves no equations: must be None or 'none'"
        )
    linear = _matrix_part(func, table)
    made_of = object_key(func, mass, preconditioner)
    how = (newton, only_batch)
    # The memory of a tape, which a solver keeps, depends on the map between steps.
    same = Same(partition), Same(trajectory.ledger), Same(settings.between_steps)
    key = (*same, layout, table, sizes, repr(options), trajectory, how, *made_of)

    def create() -> Solver:
        made = Solver.create(partition, layout, table, sizes, options, trajectory, mass, preconditioner, linear, *how)
        # A preconditioner that is PETSc's context itself may change its contents while it works.
        works = getattr(made.stepper, "built", None) is preconditioner
        made.contents = contents_of(func, mass, None if works else preconditioner)
        return made

    agreed = None
    if isinstance(preparing, Preparation):
        known = solvers.find(key)
        # Check these arguments before the ranks agree, so that an error here is raised on all of them.
        if isinstance(mass, torch.Tensor | tuple | list):
            mass_matrix(mass, layout)
        if control is not None:
            check_shapes(control, layout)
        steps = 0 if len(times) == 1 else None if grid is None else grid.steps
        agreed = preparing.agree(
            facts(replace(settings, newton=newton), table, layout, times, func, needs_gradient, needs_time_gradient),
            known is None,
            slot_bounds(
                trajectory,
                layout.size * trajectory.slot_dtype(layout.numpy_dtype).itemsize,
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
    took = None
    if settings.compiler is not None and settings.compiler.automatic:
        automatic = settings.compiler.automatic[needs_gradient]
        took = automatic.next_solve(solver.stepper.comm)
        settings = settings if automatic.compiles else replace(settings, compiler=None)
    # Older releases of torch cannot order the exchanges of f in compiled code.
    compiles_steps = (newton == "batch" and table.family != "irk") or (
        table.family in ("rk", "symplectic") and (solver.stepper.comm.size == 1 or TRACES_OBJECTS)
    )
    surroundings, carried = None, NOTHING_CARRIED
    if needs_gradient or (compiles_steps and settings.compiler is not None):
        surroundings = Surroundings.now(whole, args, layout.device)
        carried = _carried(surroundings.bindings, parameters.tensors, copies, layout, settings, solver.known)
    bound = BoundFunction(
        in_compute_type(func, copies),
        copies.args,
        replace(parameters, tensors=copies.of(parameters.tensors)) if copies.by_original else parameters,
        copies,
        {} if compiles_steps or settings.compiler is None else settings.compiler.compiled(func, table, newton),
        watched=torch.is_grad_enabled() and not needs_gradient,
        needs_time_gradient=needs_time_gradient,
        checks_parameters=solver.checks_parameters(),
        carried=carried,
        between=None if between is None else in_compute_type(between, copies),
    )
    time_dtype = t.dtype if isinstance(t, torch.Tensor) else torch.float64
    solve = Solve(
        solver,
        times,
        grid,
        control,
        bound,
        parameters.tensors,
        SolveStatistics(),
        needs_gradient,
        settings.fixed_plan,
        time_dtype,
        settings.saving,
        None if observe is None else in_compute_type(observe, copies),
        cost_of(whole),
        _consumer(settings.on_output, layout, whole),
        surroundings,
        settings.on_mismatch,
        agreed,
        settings.callbacks,
        jumps,
        settings.compiler if compiles_steps else None,
        took,
    )
    return solve, layout, tensors


def _consumer(
    on_output: Callable[[float, Any], None] | None, layout: StateLayout, func: Function
) -> Callable[[float, Parts], None] | None:
    """Return the function that takes the outputs as tensors, from the user's that takes states or observations."""
    if on_output is None:
        return None
    if not callable(on_output):
        raise TypeError(f"on_output must be callable as on_output(t, u), got {type(on_output).__name__}")
    return lambda time, values: on_output(time, in_form_of(func, layout, values))


def usable_outside_inference(value: Any) -> Any:
    """Return copies of inference tensors, or of a tuple of them, that can be differentiated."""
    if isinstance(value, tuple | list):
        return tuple(map(usable_outside_inference, value))
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def _carried(
    bindings: Bindings,
    parameters: Parts,
    copies: ComputeCopies,
    layout: StateLayout,
    settings: CallSettings,
    known: KnownTensors,
) -> Carried:
    """Return the state that the right-hand side carries between evaluations, at the beginning of a solve."""
    inputs, buffers = set(map(id, parameters)), bindings.buffers
    tensors = [tensor for tensor in bindings.tensors if id(tensor) not in inputs]
    seen = zip(copies.of(tensors), (id(tensor) in buffers for tensor in tensors), strict=True)
    return Carried(bindings, seen, layout.device, settings.preserve_rng_state, known)


def _matrix_part(func: Function, method: methods.Method) -> MatrixFunction | None:
    """Return the implicit part of the right-hand side if it is a Mat, else None."""
    if not method.implicit:
        return None
    part = func.implicit if isinstance(func, SplitFunction) and method.family == "arkimex" else func
    return part if isinstance(part, MatrixFunction) else None


def settings_of_tangents(
    settings: CallSettings, func: Function, is_tuple: bool, before: Callable[[], Solve], copies: int
) -> CallSettings:
    """Return the settings of the solve of a state with its tangents, `copies` of the state in all.

    With error control the steps are those that the solve without tangents, run by `before`, has accepted.
    """
    func, _ = separated(func)
    if settings.control() is not None:
        solve = before()
        # Name the method: the default differs with and without error control.
        name = solve.solver.stepper.method.name
        options = without_adaptation(settings.options)
        settings = without_control(settings)
        settings = replace(settings, grid=solve.grid, method=name, options=options)
    if settings.mass is not None:
        masses = tuple(settings.mass) if isinstance(settings.mass, tuple | list) and is_tuple else (settings.mass,)
        settings = replace(settings, mass=masses * copies)
    preconditioner = resolve_preconditioner(settings.preconditioner)
    base = preconditioner or _matrix_part(func, methods.resolve(settings.method or "rk4"))
    if base is not None and not isinstance(base, BlockInverse):
        inner, outer = split_options(settings.options)
        repeated = Repeated(base, copies, is_tuple, tuple(inner.items()))
        settings = replace(settings, preconditioner=repeated, options=outer)
    # Tangents are derivatives of vector-Jacobian products, which compiled code lacks. Their plan differs too.
    return replace(settings, compiler=None, fixed_plan=None)
