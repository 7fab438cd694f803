"""One call of torchdiffeq's functions: its arguments in this package's terms, and the solves that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.autograd.outside_graphs import outside_graphs
from pnode_dist.ode.call_agreement import preparation
from pnode_dist.ode.complex_state import ComplexForm, real_call
from pnode_dist.ode.differentiable_solve import differentiable_solve
from pnode_dist.ode.kept_solvers import KeptSolvers, NoSolvers
from pnode_dist.ode.rhs.layout import State
from pnode_dist.ode.settings import CallSettings
from pnode_dist.ode.solver import communicator
from pnode_dist.ode.steppers.step_rule import StepCallback
from pnode_dist.ode.time_grid import TimeGrid, output_times
from pnode_dist.partition.protocol import Partition
from pnode_dist.torchdiffeq.adjoint import adjoint_parameters
from pnode_dist.torchdiffeq.callbacks import callbacks_of
from pnode_dist.torchdiffeq.events import event_of, until_event
from pnode_dist.torchdiffeq.grids import Brackets, brackets, outputs_at
from pnode_dist.torchdiffeq.methods import named
from pnode_dist.torchdiffeq.options import AdaptiveOptions, FixedOptions, adaptive_options, fixed_options
from pnode_dist.torchdiffeq.pieces import Piece, pieces, within

# The solvers of a function are reused at its next call, and are freed with the function.
_SOLVERS: WeakKeyDictionary[Any, tuple[KeptSolvers, KeptSolvers]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Call:
    """The arguments of a call, not yet checked. `is_adjoint`: the call is one of `odeint_adjoint`."""

    func: Callable[..., Any]
    y0: State
    t: torch.Tensor
    rtol: Any
    atol: Any
    method: str | None
    options: Mapping[str, Any] | None
    partition: Partition | None
    trajectory: CheckpointBudget | None
    event_fn: Any = None
    is_adjoint: bool = False
    adjoint_params: Any = None


@outside_graphs
def solved(call: Call) -> Any:
    """Return the outputs of a call, or with `event_fn` the time of the event and the states there and at `t[0]`.

    Collective on the partition's communicator.

    An error in the arguments on one rank is raised on all.
    """
    with preparation(communicator(call.partition)) as preparing:
        solve = _checked(replace(call, y0=_of_one_type(call.y0)))
        preparing.later()
    return solve()


def _checked(call: Call) -> Callable[[], Any]:
    """Return the function that solves. Raises `ConfigurationError` for a wrong argument."""
    params = None
    if call.is_adjoint:
        params = adjoint_parameters(call.func, call.adjoint_params)
    method = named(call.method)
    if not isinstance(call.t, torch.Tensor) or not call.t.is_floating_point():
        kind = call.t.dtype if isinstance(call.t, torch.Tensor) else type(call.t).__name__
        raise ConfigurationError(f"t must be a one-dimensional floating-point tensor, got {kind}")
    output_times(call.t)
    settings = CallSettings(
        method=method.native,
        partition=call.partition,
        trajectory=call.trajectory,
        params=params,
        callbacks=callbacks_of(call.func, method, call.is_adjoint),
    )
    if method.adaptive:
        adaptive = adaptive_options(method, call.options)
        if call.event_fn is not None:
            controlled = _controlled(call, settings, adaptive)
            event = event_of(call.event_fn, call.y0, call.t[0])
            return partial(until_event, call.func, call.y0, call.t, event, controlled, adaptive)
        return partial(_with_error_control, call, _controlled(call, settings, adaptive), pieces(call.t, adaptive))
    _tolerances(call)
    options = fixed_options(method, call.options)
    if call.event_fn is not None:
        stepped = replace(settings, step_size=options.step_size)
        event = event_of(call.event_fn, call.y0, call.t[0])
        return partial(until_event, call.func, call.y0, call.t, event, stepped, options)
    # They decide on the number of solves, and on evaluations of func after a solve.
    settings = replace(settings, compared=(("interp", options.interp), ("perturb", options.perturb)))
    return partial(_with_given_steps, call, settings, brackets(call.func, call.y0, call.t, options), options)


def _with_given_steps(call: Call, settings: CallSettings, places: Brackets, options: FixedOptions) -> State:
    if options.perturb and len(places.times) > 1:
        states = _step_by_step(call, settings, places)
    else:
        states = _solve(call.func, call.y0, places.times, replace(settings, grid=places.steps))
    return outputs_at(places, call.func, states, options.interp)


def _step_by_step(call: Call, settings: CallSettings, places: Brackets) -> State:
    """Return the states at all ends of steps, with a solve for each step, because f may jump between two steps."""
    y, found = call.y0, []
    for number, (start, size) in enumerate(zip(places.steps.starts, places.steps.sizes, strict=True)):
        piece = Piece(places.times[number : number + 2], [0, 1] if number == 0 else [1], True, True)
        grid = TimeGrid((start,), (size,), {0: 0, 1: 1})
        states = _solve(within(call.func, piece), y, piece.times, replace(settings, grid=grid), call.func)
        y = _row(states, -1)
        found.append(_row(states, piece.wanted))
    return _joined(found)


def _controlled(call: Call, settings: CallSettings, options: AdaptiveOptions) -> CallSettings:
    """Return the settings of a solve with error control."""
    if call.partition is not None and call.partition.comm.size > 1 and options.rule.norm is not None:
        raise ConfigurationError(
            "options: 'norm': a function of this rank's part alone cannot be the norm of a whole state"
        )
    rtol, atol = _tolerances(call)
    if isinstance(rtol, float) and isinstance(atol, float) and rtol == atol == 0:
        raise ConfigurationError("rtol = 0.0, atol = 0.0: one of them must be positive")
    first = None if options.first_step is None else options.rule.limited(options.first_step)
    return replace(settings, rtol=rtol, atol=atol, step_size=first, rule=options.rule)


def _with_error_control(call: Call, settings: CallSettings, parts: list[Piece]) -> State:
    y, found = call.y0, []
    for piece in parts:
        states = _solve(within(call.func, piece), y, piece.times, settings, call.func)
        y = _row(states, -1)
        whole = len(piece.wanted) == len(piece.times)
        found.append(states if whole else _row(states, piece.wanted))
    return found[0] if len(found) == 1 else _joined(found)


def _solve(func: Any, y0: State, t: torch.Tensor, settings: CallSettings, owner: Any = None) -> State:
    """Solve with the solvers that are kept for `owner`, by default `func`."""
    solvers, tangents = _kept_for(func if owner is None else owner)
    call = real_call(func, y0, settings)
    if call.form is not None:
        settings = _of_complex(call.settings, call.form)
    states: State = call.outputs(differentiable_solve(solvers, tangents, call.func, call.u0, t, settings, ())[0])
    return states


def _of_complex(settings: CallSettings, form: ComplexForm) -> CallSettings:
    """Return the settings of a solve of real views, whose norm and callbacks get complex states."""

    def called(callback: StepCallback | None) -> StepCallback | None:
        return None if callback is None else lambda t, u, size: callback(t, form.complex(u), size)

    rule, callbacks = settings.rule, settings.callbacks
    if rule is not None and rule.norm is not None:
        norm = rule.norm
        rule = replace(rule, norm=lambda error: norm(form.complex(error)))
    changed = {name: called(getattr(callbacks, name)) for name in ("step", "accept", "reject", "reached")}
    return replace(settings, rule=rule, callbacks=replace(callbacks, **changed))


def _kept_for(func: Any) -> tuple[KeptSolvers, KeptSolvers]:
    try:
        return _SOLVERS.setdefault(func, (KeptSolvers(), KeptSolvers()))
    except TypeError:
        # A function that cannot be a key, such as a frozen object with a dictionary inside.
        return NoSolvers(), NoSolvers()


def _of_one_type(y0: State) -> State:
    """Return the state with parts of different floating types promoted to one, as torchdiffeq does."""
    if not isinstance(y0, tuple | list) or not y0 or not all(isinstance(part, torch.Tensor) for part in y0):
        return y0
    common = reduce(torch.promote_types, (part.dtype for part in y0))
    return tuple(part.to(common) for part in y0)


def _joined(found: list[State]) -> State:
    """Return the outputs of successive pieces as those of one solve."""
    if isinstance(found[0], torch.Tensor):
        return torch.cat([states for states in found if isinstance(states, torch.Tensor)])
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _row(states: State, rows: int | list[int]) -> State:
    return states[rows] if isinstance(states, torch.Tensor) else tuple(part[rows] for part in states)


def _tolerances(call: Call) -> tuple[Any, Any]:
    return _tolerance("rtol", call.rtol, call.y0), _tolerance("atol", call.atol, call.y0)


def _tolerance(name: str, given: Any, y0: State) -> Any:
    """Return a tolerance as a number, a tensor, or a tuple of one for each part of the state."""
    if isinstance(given, torch.Tensor):
        if given.requires_grad:
            raise ConfigurationError(f"{name}: cannot require a gradient")
        if given.dim() == 0 or isinstance(y0, torch.Tensor):
            return given.item() if given.dim() == 0 else given
    if isinstance(given, int | float):
        return float(given)
    try:
        if isinstance(y0, torch.Tensor):
            return torch.as_tensor(given)
        parts = [torch.as_tensor(part) for part in given]
    except (TypeError, ValueError, RuntimeError):
        raise ConfigurationError(
            f"{name} = {given!r}: must be a number, a tensor, or one for each part of y0"
        ) from None
    if len(parts) != len(y0):
        raise ConfigurationError(f"{name}: {len(parts)} tolerances for a state of {len(y0)} parts")
    # torchdiffeq takes a flat tensor with an entry for each of the part.
    return tuple(
        part.reshape(state.shape) if part.dim() == 1 and part.numel() == state.numel() else part
        for part, state in zip(parts, y0, strict=True)
    )
