"""The search for the next event: steps without a trajectory, and steps of other sizes to find the zero in one of them.

The sign of each g is examined at the end of every accepted step. A zero is located on the step itself: by steps of the
same method, of other sizes, from the state before. Where an event has just happened, the sign follows from a short step
(A. C. Hindmarsh et al.: SUNDIALS, ACM Trans. Math. Softw. 31 (2005), do the same).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from mpi4py import MPI

from pnode_dist.errors import EventError
from pnode_dist.hybrid.event import Event
from pnode_dist.hybrid.event_root import right_end
from pnode_dist.hybrid.event_states import parts_of, row
from pnode_dist.hybrid.event_values import clock, on_all_ranks, values_at
from pnode_dist.ode.differentiable_solve import differentiable_solve
from pnode_dist.ode.kept_solvers import KeptSolvers
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import State
from pnode_dist.ode.rhs.observed import Flattened
from pnode_dist.ode.settings import CallSettings
from pnode_dist.ode.time_grid import TimeGrid, divided


@dataclass(frozen=True, eq=False)
class HybridSystem:
    """A right-hand side with its events, and the settings of its solves.

    `searching` are the settings of the search, and `repeating` those that repeat its steps. `rounding` is that of the
    times, `tolerance` the longest time from a zero to its event, or None for the rounding of the state's type. `jumps`
    are the times at which func jumps, in increasing order. `observe` makes outputs of states, None: they are states.
    """

    func: Function
    args: tuple[Any, ...]
    events: tuple[Event, ...]
    comm: MPI.Comm
    searching: CallSettings
    repeating: CallSettings
    rounding: float
    tolerance: float | None
    jumps: tuple[float, ...] = ()
    observe: Flattened | None = None
    solvers: KeptSolvers = field(default_factory=KeptSolvers)
    tangent_solvers: KeptSolvers = field(default_factory=KeptSolvers)

    def repeated(self, u: State, times: Any, grid: TimeGrid) -> State:
        """Return the states at `times` by the steps of `grid`. Differentiable and collective."""
        settings = replace(self.repeating, grid=grid)
        solved = differentiable_solve(self.solvers, self.tangent_solvers, self.func, u, times, settings, self.args)
        states: State = solved[0]
        return states

    def observed(self, t: torch.Tensor | float, u: State) -> State:
        """Return the output at a time. Collective. Raises `TypeError` for observations that are not tensors."""
        observe = self.observe
        if observe is None:
            return u
        found: State = on_all_ranks(self.comm, lambda: observe(clock(t, u), parts_of(u), *self.args))
        return found

    def stepped(self, u: State, start: float, end: float) -> State:
        """Return the state after one step from `start` to `end`. Collective."""
        with torch.no_grad():
            states = self.repeated(u, (start, end), self.one_step(start, end))
        return row(states, -1)

    def one_step(self, start: float, end: float) -> TimeGrid:
        """Return the grid of one step, in which func is evaluated between the jumps around the step."""
        ordered = sorted(self.jumps, reverse=end < start)
        direction = math.copysign(1.0, end - start)
        before = [jump for jump in ordered if (jump - start) * direction <= 0][-1:]
        after = [jump for jump in ordered if (jump - end) * direction >= 0][:1]
        around = {number: jump for number, found in enumerate((before, after)) for jump in found}
        return TimeGrid((start,), (end - start,), {0: 0, 1: 1}, around)

    def tolerance_at(self, start: float, end: float, u: State) -> float:
        """Return the longest time from a zero to its event, in a step from `start` to `end`."""
        dtype = parts_of(u)[0].dtype
        size = max(abs(start), abs(end))
        least = 4 * torch.finfo(torch.float64).eps * size
        return max(least, 4 * torch.finfo(dtype).eps * size if self.tolerance is None else self.tolerance)


class Output(NamedTuple):
    """The output at the output time of this number; None if it is not kept."""

    number: int
    value: State | None


@dataclass(eq=False)
class Walk:
    """The steps from a start on that were accepted.

    `outputs[n]` is the number of the output time that n steps lead to, and `states` are the outputs there if they are
    kept. `time` and `state` are where the steps end. `sides[i]` is the sign of event i there, 0 if it is undecided.
    `jumps[n]` is the time of a jump of func before step n.
    """

    time: float
    state: State
    sides: list[int]
    starts: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    outputs: dict[int, int] = field(default_factory=lambda: {0: 0})
    states: list[State] = field(default_factory=list)
    jumps: dict[int, float] = field(default_factory=dict)

    def step_to(self, time: float, state: State, sides: list[int], output: Output | None) -> None:
        """Add a step that ends at `time`, with the output there if it is an output time."""
        self.starts.append(self.time)
        self.sizes.append(time - self.time)
        if output is not None:
            self.outputs[len(self.starts)] = output.number
            if output.value is not None:
                self.states.append(output.value)
        self.time, self.state, self.sides = time, state, sides


@dataclass(frozen=True, eq=False)
class Crossing:
    """The events `fired` at time `at`, in the step that begins at `start` with the state `state`.

    It is the step `number` of the walk, and leads to the state `result`. `owners` are the ranks that the values of the
    events are taken from.
    """

    number: int
    start: float
    state: State
    at: float
    result: State
    fired: tuple[int, ...]
    owners: tuple[int, ...]


class _Crossed(Exception):  # noqa: N818
    """Ends the solve of the search after a step with an event in it."""

    def __init__(self, time: float, values: tuple[float, ...], state: State, candidates: list[int]) -> None:
        self.time, self.values, self.state, self.candidates = time, values, state, candidates


def search(
    system: HybridSystem, u: State, times: tuple[float, ...], fired: tuple[int, ...], keeps_outputs: bool, count: int
) -> tuple[Walk, Crossing | None]:
    """Step from `u` at `times[0]` through the output times up to the first event. Collective.

    `fired` are the events that have just happened at the start, and `count` is the number of events so far. A step that
    ends at an output time where an event happens belongs to the walk. Raises `EventError` if an event that has just
    been reset happens again at once.
    """
    walk = Walk(times[0], u, _sides_at_start(system, u, times, fired, count))
    numbers = {time: number for number, time in enumerate(times)}

    def output_at(time: float, state: State) -> Output | None:
        if time not in numbers:
            return None
        return Output(numbers[time], system.observed(time, state) if keeps_outputs else None)

    def note_jump() -> None:
        if walk.time in system.jumps:
            walk.jumps[len(walk.starts)] = walk.time

    note_jump()

    def reached(t: torch.Tensor, state: State, size: torch.Tensor) -> None:
        time = t.item()
        values, _ = values_at(system.events, system.comm, time, state, system.args)
        signs = [_sign(value) for value in values]
        candidates = [
            number
            for number, (side, sign, event) in enumerate(zip(walk.sides, signs, system.events, strict=True))
            if side * sign <= 0 and side != 0 and event.direction in (0, -side)
        ]
        if candidates:
            raise _Crossed(time, values, state, candidates)
        walk.step_to(time, state, signs, output_at(time, state))
        note_jump()

    settings = system.searching
    grid = None
    if settings.control() is None:
        grid = divided(times, settings.step_size, system.rounding, system.jumps)
    settings = replace(settings, grid=grid, callbacks=replace(settings.callbacks, reached=reached))
    try:
        with torch.no_grad():
            differentiable_solve(system.solvers, system.tangent_solvers, system.func, u, times, settings, system.args)
    except _Crossed as crossed:
        found = crossed
    else:
        return walk, None
    crossing = _located(system, walk, found)
    if crossing.at == found.time and found.time in numbers:
        walk.step_to(found.time, found.state, walk.sides, output_at(found.time, found.state))
    return walk, crossing


def _located(system: HybridSystem, walk: Walk, found: _Crossed) -> Crossing:
    """Return the first crossing in the step that follows `walk`, with all events that happen then."""
    start, end = walk.time, found.time
    known = {end: found.values}

    def values(time: float) -> tuple[float, ...]:
        if time not in known:
            state = system.stepped(walk.state, start, time)
            known[time] = values_at(system.events, system.comm, time, state, system.args)[0]
        return known[time]

    tolerance = system.tolerance_at(start, end, walk.state)
    at_start = values_at(system.events, system.comm, start, walk.state, system.args)[0]
    at = end
    for number in found.candidates:
        side = walk.sides[number]
        if side * values(at)[number] <= 0:
            # Undecided at the start, an event has the sign of a short step, and no value there.
            first = at_start[number] if at_start[number] * side > 0 else side * math.ulp(0.0)
            value = partial(_entry, values, number)
            at = right_end(value, (start, first), (at, value(at)), tolerance)
    later = at + math.copysign(tolerance, end - start)
    if abs(end - at) <= tolerance:
        at = later = end
    fired = tuple(number for number in found.candidates if walk.sides[number] * values(later)[number] <= 0)
    result = found.state if at == end else system.stepped(walk.state, start, at)
    owners = values_at(system.events, system.comm, at, result, system.args)[1]
    return Crossing(len(walk.starts), start, walk.state, at, result, fired, tuple(owners[number] for number in fired))


def _sides_at_start(
    system: HybridSystem, u: State, times: tuple[float, ...], fired: tuple[int, ...], count: int
) -> list[int]:
    """Return the sign of each event at the start. Zero values, and events that have just happened, get that of a step.

    The step is the geometric mean of the tolerance and the length of the first interval, which ends at a jump too.
    """
    start, end = times[:2]
    ahead = [end, *(jump for jump in system.jumps if min(start, end) < jump < max(start, end))]
    span = min(ahead, key=lambda time: abs(time - start)) - start
    values, _ = values_at(system.events, system.comm, start, u, system.args)
    sides = [_sign(value) for value in values]
    unsure = [number for number, side in enumerate(sides) if side == 0 or number in fired]
    if not unsure:
        return sides
    tolerance = system.tolerance_at(start, times[1], u)
    wide, narrow = (_between(start, span, tolerance, share) for share in (0.5, 0.25))
    signs = _signs_after(system, u, start, wide)
    bounced = [number for number in fired if system.events[number].reset is not None and signs[number] != 0]
    if bounced:
        sooner = _signs_after(system, u, start, narrow)
        for number in bounced:
            direction = system.events[number].direction
            if sooner[number] * signs[number] < 0 and direction in (0, signs[number]):
                raise EventError(
                    f"event {system.events[number].name!r}: happens again within {abs(wide - start):.2g} of its reset "
                    f"at t = {start:.12g}, after {count} events: they accumulate there (Zeno behaviour); end the solve "
                    "before, such as by another event that is terminal"
                )
    for number in unsure:
        sides[number] = signs[number]
    return sides


def _between(start: float, span: float, tolerance: float, share: float) -> float:
    """Return a time after the start, between the tolerance and the end of the span."""
    length = min(tolerance ** (1 - share) * abs(span) ** share, abs(span) / 4)
    return start + math.copysign(max(length, math.ulp(start)), span)


def _signs_after(system: HybridSystem, u: State, start: float, end: float) -> list[int]:
    state = system.stepped(u, start, end)
    return [_sign(value) for value in values_at(system.events, system.comm, end, state, system.args)[0]]


def _entry(values: Callable[[float], tuple[float, ...]], number: int, time: float) -> float:
    return values(time)[number]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
