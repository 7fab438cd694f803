"""`solve_events`: a solve with events, as a differentiable operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import torch
from mpi4py import MPI

from pnode_dist.errors import ConfigurationError, EventError
from pnode_dist.hybrid.event import Event, EventSolution
from pnode_dist.hybrid.event_complex import complex_solution, on_real_views
from pnode_dist.hybrid.event_gradient import event_time, repeated_walk, state_at
from pnode_dist.hybrid.event_search import Crossing, HybridSystem, search
from pnode_dist.hybrid.event_states import detached, joined, lifted, mapped, parts_of, row
from pnode_dist.hybrid.event_values import OnAllRanks, clock, on_all_ranks
from pnode_dist.ode import methods
from pnode_dist.ode.autograd.outside_graphs import outside_graphs
from pnode_dist.ode.autograd.transforms import transforming
from pnode_dist.ode.call_agreement import Preparation, preparation, state_shape
from pnode_dist.ode.complex_state import real_call
from pnode_dist.ode.given_options import without_adaptation
from pnode_dist.ode.jumps import check_times_off_jumps, checked_jumps
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import Parts, State, layout_of
from pnode_dist.ode.rhs.observed import Flattened
from pnode_dist.ode.rhs.parameters import find_parameters
from pnode_dist.ode.settings import (
    CallSettings,
    SolverKeywords,
    SolverSettings,
    Times,
    lists_settings,
    merged,
    refuse_other_outputs,
    without_control,
)
from pnode_dist.ode.solver import communicator
from pnode_dist.ode.steppers.step_rule import StepCallbacks
from pnode_dist.ode.time_grid import check_step_size, output_times
from pnode_dist.ode.time_rounding import rounding_of

MOST_EVENTS = 1000
_CLOSE = 16


@lists_settings
@outside_graphs
def solve_events(
    func: Function,
    u0: State,
    t: Times,
    events: Event | Sequence[Event],
    settings: SolverSettings | None = None,
    *,
    args: tuple[Any, ...] = (),
    max_events: int = MOST_EVENTS,
    time_tolerance: float | None = None,
    **keywords: Unpack[SolverKeywords],
) -> EventSolution:
    """Solve M du/dt = func(t, u, *args) from u(t[0]) = u0 with events; differentiable in all that `odeint` is.

    Collective on the partition's communicator, and so is the backward pass. The arguments are those of
    `pnode_dist.odeint`, which takes the steps; `save` is "times" or "last". Returns an `EventSolution`. Its event times
    are differentiable too, and all of it with respect to parameters of the events' `g` and `reset`, which get the same
    `args` as func.

    The solve ends at `t[-1]` or at a terminal event, and returns the output times up to there. The sign of each g is
    examined at the end of every accepted step; two zeros of one g in a step are not found, so limit the steps. A zero
    is located by steps of other sizes from the state before, to `time_tolerance` in the units of t, by default 4
    roundings of the time in the type of u0. The event is at the end of that bracket where g has changed its sign, or
    is zero. At an event the step is cut; steps, and error control, begin afresh after it. Events at one time happen in
    the order of the list. A g that is zero at `t[0]` is no event, nor one that touches zero within a step without
    changing its sign. Steps end at `jumps` too, and func is evaluated on the step's side of them; g and `reset` must be
    continuous in time there. With `observe` the outputs `u` are h(t, u, *args); without a gradient no other states are
    held than those at events.

    The gradient is exact for the steps taken, with event times by the implicit function theorem. It has no second
    derivative. With a gradient the steps are taken twice: for the search, and for the trajectory. func must be a
    function of t, u and its parameters.

    Raises `EventError` for more than `max_events` events, for events that accumulate, for a g that is nan, and in a
    solve with a gradient where dg/dt is zero at an event; `ConfigurationError` for wrong arguments; otherwise like
    `odeint`.
    """
    asked = CallSettings(**vars(merged(settings, keywords, "solve_events")))
    return located(func, u0, t, events, asked, args, max_events, time_tolerance)


def located(
    func: Function,
    u0: State,
    t: Times,
    events: Event | Sequence[Event],
    asked: CallSettings,
    args: tuple[Any, ...] = (),
    max_events: int = MOST_EVENTS,
    time_tolerance: float | None = None,
) -> EventSolution:
    """Solve like `solve_events`, with the settings of a call."""
    comm = communicator(asked.partition)
    with preparation(comm, "solve with events") as preparing:
        listed = _checked_events(events)
        _check_limits(max_events, time_tolerance)
        if asked.save == "last":
            asked = replace(asked, save="times", last_only=True)
        refuse_other_outputs(replace(asked, last_only=False, observe=None), "a solve with events")
        times, jumps = output_times(t), checked_jumps(asked.jumps)
        if isinstance(t, torch.Tensor) and t.requires_grad and torch.is_grad_enabled():
            check_times_off_jumps(times, jumps)
        check_step_size(asked.step_size)
        call = real_call(func, u0 if isinstance(u0, torch.Tensor) else tuple(u0), asked)
        func, u0, asked = call.func, call.u0, call.settings
        if call.form is not None:
            listed = tuple(on_real_views(event, call.form) for event in listed)
        layout, parts = layout_of(u0, asked.compute_dtype)
        system = _system(func, args, listed, asked, layout.is_tuple, rounding_of(t, times), time_tolerance)
        needed = torch.is_grad_enabled() and any(
            tensor.requires_grad
            for tensor in (
                *parts,
                *(asked.params or ()),
                *find_parameters(func, args),
                *((t,) if isinstance(t, torch.Tensor) else ()),
                *(find_parameters(asked.observe, ()) if asked.observe is not None else ()),
                *(held for event in listed for held in find_parameters(event.g, ())),
                *(held for event in listed if event.reset is not None for held in find_parameters(event.reset, ())),
            )
        )
        if isinstance(preparing, Preparation):
            method = system.repeating.method
            assert asked.partition is not None
            shapes = state_shape(layout.shapes, asked.partition)
            facts = (("method", method), ("state", shapes), ("dtype", layout.dtype), ("t", times))
            others = (("max_events", max_events), ("time_tolerance", time_tolerance), ("jumps", jumps))
            preparing.agree((*facts, ("events", tuple(event.facts for event in listed)), *others), False, ())
    # The times of later events are doubles, so all of them are.
    moments = torch.as_tensor(t, dtype=torch.float64).cpu()
    differentiable = bool(comm.allreduce(needed, MPI.LOR))
    solution = _through_events(system, u0, moments, differentiable, asked.last_only, max_events)
    return complex_solution(solution, call)


def _checked_events(events: Event | Sequence[Event]) -> tuple[Event, ...]:
    listed = (events,) if isinstance(events, Event) else tuple(events)
    for event in listed:
        if not isinstance(event, Event):
            raise ConfigurationError(f"events: must be of type pnode_dist.Event, got {type(event).__name__}")
    if not listed:
        raise ConfigurationError("events: must hold one event or more; without events call odeint")
    return listed


def _check_limits(max_events: int, time_tolerance: float | None) -> None:
    if isinstance(max_events, bool) or not isinstance(max_events, int) or max_events < 1:
        raise ConfigurationError(f"max_events = {max_events!r}: must be a positive number of events")
    if time_tolerance is not None and not (time_tolerance > 0 and math.isfinite(time_tolerance)):
        raise ConfigurationError(f"time_tolerance = {time_tolerance!r}: must be a positive time, or None")


def _system(
    func: Function,
    args: tuple[Any, ...],
    events: tuple[Event, ...],
    asked: CallSettings,
    is_tuple: bool,
    rounding: float,
    tolerance: float | None,
) -> HybridSystem:
    if transforming():
        raise ConfigurationError("events: not available under torch's transforms or in forward mode")
    control = asked.control()
    method = methods.resolve(asked.method or ("rk4" if control is None else "dopri5"))
    if method.family == "bdf":
        raise ConfigurationError(
            f"method = {method.name!r}: a step depends on those before it, and cannot be taken with another size to "
            "locate an event: choose a method with one step"
        )
    observe = None if asked.observe is None else Flattened(asked.observe, is_tuple)
    asked = replace(asked, observe=None)
    options = asked.options if control is None else without_adaptation(asked.options)
    repeating = replace(
        without_control(asked),
        method=method.name,
        rule=None,
        jumps=None,
        options=options,
        callbacks=StepCallbacks(pulled_back=asked.callbacks.pulled_back),
        last_only=False,
    )
    searching = replace(asked, method=method.name, last_only=True)
    comm, jumps = communicator(asked.partition), checked_jumps(asked.jumps)
    return HybridSystem(func, args, events, comm, searching, repeating, rounding, tolerance, jumps, observe)


@dataclass(eq=False)
class _Found:
    """The outputs and the events of a solve so far."""

    outputs: list[State] = field(default_factory=list)
    times: list[torch.Tensor] = field(default_factory=list)
    which: list[int] = field(default_factory=list)
    before: list[State] = field(default_factory=list)
    after: list[State] = field(default_factory=list)


def _through_events(
    system: HybridSystem, u0: State, moments: torch.Tensor, differentiable: bool, last_only: bool, max_events: int
) -> EventSolution:
    """Solve from event to event, up to the last of `moments` or a terminal event. Collective."""
    found = _Found()
    start, u, done = moments[0], u0, 1
    fired: tuple[int, ...] = ()
    while done < len(moments):
        ahead = torch.cat([start.reshape(1), moments[done:]])
        values = tuple(ahead.tolist())
        keeps = not (last_only or differentiable)
        walk, crossing = search(system, detached(u), values, fired, keeps, len(found.which))
        done += len(walk.outputs) - 1
        if differentiable:
            outputs, before, begin = repeated_walk(system, u, walk, ahead, crossing)
            if not last_only:
                found.outputs += _observed(system, ahead[1:], outputs)
        else:
            found.outputs += [lifted(state) for state in walk.states]
            before, begin = walk.state, torch.tensor(walk.time, dtype=torch.float64)
        if crossing is None:
            start, u = begin, before
            break
        start, u = _happen(system, crossing, before, begin, differentiable, found)
        _refuse_too_many(system, found, max_events)
        fired = crossing.fired
        if any(_ends(system.events[number], number, found) for number in fired):
            break
    return _solution(system, u0, moments[:done], found, (start, u), differentiable, last_only)


def _observed(system: HybridSystem, times: torch.Tensor, states: State) -> list[State]:
    """Return the outputs at the first of `times` from the states there, as stacks. Collective."""
    if system.observe is None:
        return [states]
    count = len(parts_of(states)[0])
    return [lifted(system.observed(times[number], row(states, number))) for number in range(count)]


def _happen(
    system: HybridSystem, crossing: Crossing, before: State, begin: torch.Tensor, differentiable: bool, found: _Found
) -> tuple[torch.Tensor, State]:
    """Add the events of a crossing, and return the time and the state after them. Collective."""
    start, u = torch.tensor(crossing.at, dtype=torch.float64), crossing.result
    for place, (number, owner) in enumerate(zip(crossing.fired, crossing.owners, strict=True)):
        time = start
        if differentiable:
            time = event_time(system, number, owner, before, begin, crossing.at)
        if place == 0:
            start = time
            if differentiable:
                u = state_at(system, before, begin, time)
        found.times.append(time)
        found.which.append(number)
        found.before.append(u)
        u = _reset(system, system.events[number], time, u, differentiable)
        found.after.append(u)
    return start, u


def _reset(system: HybridSystem, event: Event, time: torch.Tensor, u: State, differentiable: bool) -> State:
    """Return the state after an event. Collective. Raises `ConfigurationError` for a state of another form."""
    reset = event.reset
    if reset is None:
        return u

    def checked() -> State:
        after = reset(clock(time, u), u, *system.args)
        after = after if isinstance(after, torch.Tensor) else tuple(after)
        parts, wanted = parts_of(after), parts_of(u)
        if [(part.shape, part.dtype) for part in parts] != [(part.shape, part.dtype) for part in wanted]:
            raise ConfigurationError(
                f"event {event.name!r}: reset returned {_forms(parts)}: must be of the form of the state, "
                f"{_forms(wanted)}"
            )
        if not differentiable and any(part.requires_grad for part in parts):
            raise ConfigurationError(
                f"event {event.name!r}: reset depends on a tensor that requires a gradient and was not found: name it "
                "with params=(...)"
            )
        return after if isinstance(u, torch.Tensor) == isinstance(after, torch.Tensor) else parts

    state: State = on_all_ranks(system.comm, checked)
    return state


def _forms(parts: Parts) -> str:
    return ", ".join(f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}" for part in parts)


def _ends(event: Event, number: int, found: _Found) -> bool:
    """Return True if the solve ends at this event."""
    return event.terminal > 0 and found.which.count(number) >= int(event.terminal)


def _refuse_too_many(system: HybridSystem, found: _Found, max_events: int) -> None:
    """Raise `EventError` if there are more events than allowed, or many of them at nearly one time."""
    count, last = len(found.times), found.times[-1].item()
    name = system.events[found.which[-1]].name
    if count > max_events:
        raise EventError(f"max_events = {max_events}: more events are needed at t = {last:.12g}, the last is {name!r}")
    if count >= _CLOSE:
        span = abs(last - found.times[-_CLOSE].item())
        if span <= _CLOSE * system.tolerance_at(last, last, found.before[-1]):
            raise EventError(
                f"event {name!r}: the last {_CLOSE} of {count} events are within {span:.2g} of t = {last:.12g}: the "
                "state chatters across the event; give it a reset that leaves the zero, or end the solve there"
            )


def _solution(
    system: HybridSystem,
    u0: State,
    moments: torch.Tensor,
    found: _Found,
    end: tuple[torch.Tensor, State],
    differentiable: bool,
    last_only: bool,
) -> EventSolution:
    """Return what was found. `end` are the time and the state at the end."""
    time, u = end
    before, after = (joined([lifted(state) for state in each], u0) for each in (found.before, found.after))
    if last_only:
        outputs = system.observed(time, u)
    else:
        first = system.observed(moments[0], u0)
        outputs = joined([lifted(first), *found.outputs], first)
    times = torch.stack(found.times) if found.times else torch.empty(0, dtype=torch.float64)
    if differentiable and system.comm.size > 1:
        forms = (before, after, u, outputs)
        flat = [part for state in forms for part in parts_of(state)]
        time, times, *flat = OnAllRanks.apply(time, times, *flat)  # type: ignore[no-untyped-call]
        rest = iter(flat)
        before, after, u, outputs = (mapped(lambda _: next(rest), form) for form in forms)
    if not differentiable and any(part.requires_grad for part in parts_of(outputs)):
        raise ConfigurationError(
            "observe: it depends on a tensor that requires a gradient and was not found: name it with params=(...)"
        )
    form = None if system.observe is None else system.observe.form
    found_at = outputs if form is None else form.rebuilt(parts_of(outputs))
    return EventSolution(moments, found_at, times, tuple(found.which), before, after, time, u)
