"""The differentiable steps up to an event, and its time by the implicit function theorem.

Let u_n be the state before the step with the event, and u(s) the result of the step from u_n to the time s. The event
is at g(s, u(s)) = 0, so its time has the derivative -dg/d(u_n, parameters) / (dg/ds), exact for the step that was
taken.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.errors import ConfigurationError, EventError, RecomputationError
from pnode_dist.hybrid.event_search import Crossing, HybridSystem, Walk
from pnode_dist.hybrid.event_states import detached, lifted, parts_of, row, rows
from pnode_dist.hybrid.event_values import differentiable_value, values_at
from pnode_dist.ode.rhs.layout import State
from pnode_dist.ode.time_grid import TimeGrid

_GRAZING = 1e-8
_ROUNDINGS = 100.0


def repeated_walk(
    system: HybridSystem, u: State, walk: Walk, times: torch.Tensor, crossing: Crossing | None
) -> tuple[State, State, torch.Tensor]:
    """Return the states at the later output times of a walk, and the state and time before the step with the event.

    `times` are the start and all later output times, of which the walk may reach some. Without an event the state and
    time are those at the end. Differentiable and collective. Raises `RecomputationError` if the repeated steps lead to
    another state.
    """
    ends = dict(walk.outputs)
    last = len(walk.starts) if crossing is None else crossing.number
    moments = {step: times[output] for step, output in ends.items()}
    if last not in moments:
        moments[last] = _within(system, times, walk, last)
    order = sorted(moments)
    outputs = [number for number, step in enumerate(order) if step in ends and step > 0]
    if len(order) == 1:
        return rows(lifted(u), []), u, times[0]
    numbers = {step: number for number, step in enumerate(order)}
    grid = TimeGrid(tuple(walk.starts), tuple(walk.sizes), numbers, walk.jumps)
    states = system.repeated(u, torch.stack([moments[step] for step in order]), grid)
    found = row(states, order.index(last))
    _compare(system, found, walk.state if crossing is None else crossing.state, walk.time)
    return rows(states, outputs), found, moments[last]


def event_time(system: HybridSystem, number: int, owner: int, u: State, start: torch.Tensor, at: float) -> torch.Tensor:
    """Return the time `at` of an event, as a function of the state `u` at the time `start` before it. Collective.

    Raises `EventError` if the derivative of g along the step is zero there, and warns if it is nearly zero.
    """
    event, comm, args = system.events[number], system.comm, system.args
    grid = system.one_step(start.item(), at)

    def value(state: State, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        result = row(system.repeated(state, torch.stack([begin, end]), grid), -1)
        return differentiable_value(event, comm, end, result, args, owner)

    end = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    # The cotangent of one rank, because the sum over the ranks has the sum of their cotangents.
    own = value(detached(u), start.detach(), end) * float(comm.rank == 0)
    (share,) = torch.autograd.grad(own, end, allow_unused=True)
    slopes = np.array([0.0 if share is None else share.item()])
    if comm.size > 1:
        comm.Allreduce(MPI.IN_PLACE, slopes, MPI.SUM)
    slope = float(slopes[0])
    if slope == 0 or not math.isfinite(slope):
        raise EventError(
            f"event {event.name!r}: dg/dt = {slope:g} at t = {at:.12g}: the time of the event has no derivative (g "
            "touches zero there); solve under torch.no_grad(), or choose another g"
        )
    (before,), _ = values_at((event,), comm, grid.starts[0], detached(u), args)
    if abs(slope * grid.sizes[0]) < _GRAZING * abs(before) and comm.rank == 0:
        warnings.warn(
            f"event {event.name!r}: dg/dt = {slope:.2g} at t = {at:.12g} is nearly zero beside g = {before:.2g} at t = "
            f"{grid.starts[0]:.12g}: g hardly crosses zero, and the gradient of the time is inaccurate",
            RuntimeWarning,
            stacklevel=2,
        )
    found = value(u, start, torch.tensor(at, dtype=torch.float64))
    time: torch.Tensor = _EventTime.apply(found, at, slope)  # type: ignore[no-untyped-call]
    return time


class _EventTime(torch.autograd.Function):
    """The time of an event as a function of its g, by the derivative of g in time."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, at: float, slope: float) -> torch.Tensor:
        """Return the time."""
        ctx.slope = slope
        return torch.full_like(value, at)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        """Return the cotangent of g. Raises `ConfigurationError` if it is to be differentiated."""
        # The slope is a constant here.
        if torch.is_grad_enabled():
            raise ConfigurationError(
                "events: second derivatives of the time of an event are not available: call backward() or grad() "
                "without create_graph"
            )
        return -cotangent / ctx.slope, None, None


def state_at(system: HybridSystem, u: State, start: torch.Tensor, end: torch.Tensor) -> State:
    """Return the state after one step from `start` to `end`. Differentiable and collective."""
    return row(system.repeated(u, torch.stack([start, end]), system.one_step(start.item(), end.item())), -1)


def _within(system: HybridSystem, times: torch.Tensor, walk: Walk, step: int) -> torch.Tensor:
    """Return the time before a step inside an interval between output times or jumps, a fixed share of the interval."""
    value = walk.starts[step] if step < len(walk.starts) else walk.time
    if step in walk.jumps:
        return torch.tensor(walk.jumps[step], dtype=torch.float64)
    passed = {number: torch.tensor(jump, dtype=torch.float64) for number, jump in walk.jumps.items()}
    passed |= {number: times[output] for number, output in walk.outputs.items()}
    begin = passed[max(number for number in passed if number <= step)]
    end = times[1 + max(output for number, output in walk.outputs.items() if number <= step)]
    jumps = [jump for jump in system.jumps if min(value, end.item()) < jump < max(value, end.item())]
    if jumps:
        end = torch.tensor(min(jumps, key=lambda jump: abs(jump - value)), dtype=torch.float64)
    share = (value - begin.item()) / (end.item() - begin.item())
    moved = begin + share * (end - begin)
    return value + (moved - moved.detach())


def _compare(system: HybridSystem, found: State, expected: State, time: float) -> None:
    """Raise `RecomputationError` on all ranks if the repeated steps differ from those of the search. Collective."""
    worst = 0.0
    for part, other in zip(parts_of(found), parts_of(expected), strict=True):
        if part.numel():
            allowed = _ROUNDINGS * math.sqrt(torch.finfo(part.dtype).eps)
            size = max(other.abs().max().item(), torch.finfo(part.dtype).tiny)
            worst = max(worst, (part.detach() - other).abs().max().item() / (size * allowed))
    if system.comm.allreduce(worst, MPI.MAX) > 1:
        raise RecomputationError(
            f"the steps up to t = {time:.6g}, repeated for the gradient, differ from those of the search for events: "
            "func must be a function of t, u and its parameters alone"
        )
