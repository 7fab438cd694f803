"""One call of `odeint` as a differentiable operation.

The call is prepared, run, and made a node of torch's graph. Under torch's transforms it is run by
`pnode_dist.ode.autograd.transformed` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import methods
from pnode_dist.ode.autograd.call import Asked, Call, Prepare
from pnode_dist.ode.autograd.differentiable import solution
from pnode_dist.ode.autograd.transformed import transformed
from pnode_dist.ode.autograd.transforms import check_not_traced, transforming
from pnode_dist.ode.coarse import finer_end, is_first_of_its_kind, warn_if_coarse
from pnode_dist.ode.kept_solvers import KeptSolvers, NoSolvers
from pnode_dist.ode.prepare import prepared, settings_of_tangents, usable_outside_inference
from pnode_dist.ode.rhs.between import mapped
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import Parts, State, StateLayout, layout_of
from pnode_dist.ode.rhs.observed import in_form_of, observed, separated
from pnode_dist.ode.rhs.tangent import WithTangent, without_tangents
from pnode_dist.ode.running_cost import is_separate, with_cost, with_separate_cost
from pnode_dist.ode.saving import Integrated, Saved, times_of_saved
from pnode_dist.ode.settings import CallSettings, Times
from pnode_dist.ode.solve import Solve
from pnode_dist.ode.solve_lock import solve_lock
from pnode_dist.ode.solver import communicator


def differentiable_solve(
    solvers: KeptSolvers,
    tangent_solvers: KeptSolvers,
    func: Function,
    u0: State,
    t: Times,
    settings: CallSettings,
    args: tuple[Any, ...],
) -> tuple[Any, Solve]:
    """Solve, and return the outputs as a function of state, parameters and times. Collective.

    The outputs are states, or the observations that the settings ask for.
    """
    whole = with_functions(func, settings, isinstance(u0, tuple | list))
    if settings.integrate is not None and is_separate(settings):
        whole, settings = with_separate_cost(whole, settings, isinstance(u0, tuple | list))
    if settings.integrate is None:
        outputs, solve = outputs_of(solvers, tangent_solvers, whole, u0, t, settings, args)
        return as_asked(outputs, solve, whole, layout_of(u0)[0], t), solve
    layout = layout_of(u0)[0]
    posed = with_cost(solvers, whole, u0, t, settings, args)
    consumer = settings.on_output
    if consumer is not None:

        def on_output(time: float, values: Parts) -> None:
            own, integral = posed.separated(values)
            consumer(time, Integrated(in_form_of(whole, layout, own), integral))

        posed = replace(posed, settings=replace(posed.settings, on_output=on_output))
    outputs, solve = outputs_of(solvers, tangent_solvers, posed.func, posed.u0, t, posed.settings, args)
    if consumer is not None:
        return None, solve
    own, integral = posed.separated(outputs)
    return Integrated(as_asked(own, solve, whole, layout, t), integral), solve


def with_functions(func: Function, settings: CallSettings, is_tuple: bool) -> Function:
    """Return `func` with the map between its steps and the observation of the settings. Raises `TypeError`."""
    return observed(mapped(func, settings.between_steps, is_tuple), settings.observe, is_tuple)


def as_asked(outputs: Parts, solve: Solve, func: Function, layout: StateLayout, t: Times) -> Any:
    """Return the outputs of a solve in the form that its settings ask for."""
    if solve.consumer is not None:
        return None
    found = in_form_of(func, layout, outputs)
    if not solve.saving.has_steps:
        return found
    times = times_of_saved(tuple(solve.saved), solve.grid if len(solve.times) > 1 else None, t)
    if isinstance(found, Integrated):
        return Integrated(Saved(times, found.u), found.integral)
    return Saved(times, found)


def outputs_of(
    solvers: KeptSolvers,
    tangent_solvers: KeptSolvers,
    func: Function,
    u0: State,
    t: Times,
    settings: CallSettings,
    args: tuple[Any, ...],
) -> tuple[Parts, Solve]:
    """Solve, and return the outputs as a tuple of tensors. Collective.

    `func` may be `Observed`. `tangent_solvers` keeps the solvers of derivatives in forward mode.
    """
    check_not_traced()
    if torch.is_inference_mode_enabled() and methods.resolve(settings.method or "rk4").implicit:
        # Newton's method differentiates f, which inference mode does not allow.
        with torch.inference_mode(False), torch.no_grad():
            usable = tuple(map(usable_outside_inference, args))
            return outputs_of(solvers, tangent_solvers, func, usable_outside_inference(u0), t, settings, usable)
    with solve_lock():
        if transforming():
            if settings.on_output is not None:
                raise ConfigurationError("on_output: not available under torch's transforms: must be None")
            call, _, tensors = transformed_call(solvers, tangent_solvers, func, u0, t, settings, args)
            return solution(call, tensors), call.latest()
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
        if settings.step_size is None and settings.grid is None and solve.control is None and solve.steps.steps == 1:
            _warn_if_step_is_too_long(solve, func, u0, t, settings, args, outputs)
    return outputs, solve


def _warn_if_step_is_too_long(
    solve: Solve, func: Function, u0: State, t: Times, settings: CallSettings, args: tuple[Any, ...], outputs: Parts
) -> None:
    """Warn once if the only step of a solve is far too long. Collective."""
    plain, _ = separated(func)
    if isinstance(plain, WithTangent) or not is_first_of_its_kind(solve.solver, plain):
        return
    if solve.consumer is not None or solve.saving.has_steps or solve.between is not None:
        return  # There is nothing to compare, who asks for the steps sees them, or more steps are another solve.
    comm, size = solve.solver.stepper.comm, abs(solve.times[1] - solve.times[0])
    halved = replace(settings, step_size=size / 2, save="last", last_only=False, fixed_plan=None)
    finer = finer_end(
        lambda: outputs_of(NoSolvers(), NoSolvers(), func, u0, t, halved, args)[0],
        func,
        args,
        comm,
    )
    if finer is not None:
        ends = outputs if solve.saving.only_last else tuple(part[-1] for part in outputs)
        what = f"one step of {solve.solver.stepper.method.name!r} from t = {solve.times[0]:g} to {solve.times[1]:g}"
        begin = solve.initial if solve.observing is None else tuple(torch.zeros_like(part) for part in finer)
        warn_if_coarse(what, size, (ends, finer, begin), comm)


def transformed_call(
    solvers: KeptSolvers,
    tangent_solvers: KeptSolvers,
    func: Function,
    u0: State,
    t: Times,
    settings: CallSettings,
    args: tuple[Any, ...],
) -> tuple[Call, StateLayout, tuple[torch.Tensor, ...]]:
    """Prepare the solve under torch's transforms, see `transformed`."""
    ranks = communicator(settings.partition).size
    is_tuple = isinstance(u0, tuple | list)
    prepare = _preparation(solvers, tangent_solvers, t, settings, is_tuple, len(u0) if is_tuple else 1)
    params, dtype = tuple(settings.params or ()), settings.compute_dtype
    explicit = not methods.resolve(settings.method or "rk4").implicit
    folds = explicit and settings.control() is None and settings.partition is None and dtype is None
    random = settings.preserve_rng_state
    return transformed(func, u0, t, args, params, dtype, ranks, prepare, random, folds, settings.saving.only_last)


def _preparation(
    solvers: KeptSolvers, tangent_solvers: KeptSolvers, t: Times, settings: CallSettings, is_tuple: bool, parts: int
) -> Prepare:
    """Return the function that prepares solves with these times and settings, and the solves of their tangents."""
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
