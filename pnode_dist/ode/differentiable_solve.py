"""One call of `odeint` as a differentiable operation.

The call is prepared, run, and made a node of torch's graph. Under torch's transforms it is run by
`pnode_dist.ode.autograd.transformed` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pnode_dist.ode import methods
from pnode_dist.ode.autograd.call import Asked, Call, Prepare
from pnode_dist.ode.autograd.differentiable import solution
from pnode_dist.ode.autograd.transformed import transformed
from pnode_dist.ode.autograd.transforms import check_not_traced, transforming
from pnode_dist.ode.coarse import finer_end, is_first_of_its_kind, warn_if_coarse
from pnode_dist.ode.kept_solvers import KeptSolvers, NoSolvers
from pnode_dist.ode.prepare import prepared, settings_of_tangents, usable_outside_inference
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import Parts, State, StateLayout, layout_of
from pnode_dist.ode.rhs.tangent import WithTangent, without_tangents
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
) -> tuple[State, Solve]:
    """Solve, and return the outputs as a function of state, parameters and times. Collective.

    `tangent_solvers` keeps the solvers of derivatives in forward mode.
    """
    check_not_traced()
    if torch.is_inference_mode_enabled() and methods.resolve(settings.method or "rk4").implicit:
        # Newton's method differentiates f, which inference mode does not allow.
        with torch.inference_mode(False), torch.no_grad():
            usable = tuple(map(usable_outside_inference, args))
            return differentiable_solve(
                solvers, tangent_solvers, func, usable_outside_inference(u0), t, settings, usable
            )
    with solve_lock():
        if transforming():
            call, layout, tensors = transformed_call(solvers, tangent_solvers, func, u0, t, settings, args)
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
        if settings.step_size is None and settings.grid is None and solve.control is None and solve.steps.steps == 1:
            _warn_if_step_is_too_long(solve, func, u0, t, settings, args, outputs)
    return layout.as_state(outputs), solve


def _warn_if_step_is_too_long(
    solve: Solve, func: Function, u0: State, t: Times, settings: CallSettings, args: tuple[Any, ...], outputs: Parts
) -> None:
    """Warn once if the only step of a solve is far too long. Collective."""
    if isinstance(func, WithTangent) or not is_first_of_its_kind(solve.solver, func):
        return
    comm, size = solve.solver.stepper.comm, abs(solve.times[1] - solve.times[0])
    halved = replace(settings, step_size=size / 2, last_only=True, fixed_plan=None)
    finer = finer_end(
        lambda: differentiable_solve(NoSolvers(), NoSolvers(), func, u0, t, halved, args)[0],
        func,
        args,
        comm,
    )
    if finer is not None:
        ends = outputs if settings.last_only else tuple(part[-1] for part in outputs)
        what = f"one step of {solve.solver.stepper.method.name!r} from t = {solve.times[0]:g} to {solve.times[1]:g}"
        warn_if_coarse(what, size, (ends, layout_of(finer)[1], solve.initial), comm)


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
    return transformed(func, u0, t, args, params, dtype, ranks, prepare, random, folds, settings.last_only)


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
