"""Solves with events in plain torch: explicit steps of a fixed size, bisection, and ordinary back-propagation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.oracles.runge_kutta import Tableau, steps_between


@dataclass(frozen=True)
class PlainEvent:
    """A zero of `g(t, u)` in one direction or both, with a reset."""

    g: Callable[..., torch.Tensor]
    direction: int = 0
    reset: Callable[..., torch.Tensor] | None = None
    terminal: int = 0


@dataclass
class PlainSolution:
    """The outputs reached, and for each event its time, its number and the states around it."""

    outputs: list[torch.Tensor] = field(default_factory=list)
    times: list[torch.Tensor] = field(default_factory=list)
    which: list[int] = field(default_factory=list)
    before: list[torch.Tensor] = field(default_factory=list)
    after: list[torch.Tensor] = field(default_factory=list)
    end: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def all(self) -> tuple[torch.Tensor, ...]:
        """All tensors of the solution, stacked."""
        return (
            torch.stack(self.outputs),
            torch.stack(self.times),
            torch.stack(self.before),
            torch.stack(self.after),
            self.end,
        )


def step(func: Callable[..., Any], table: Tableau, t: Any, u: torch.Tensor, size: Any) -> torch.Tensor:
    """The state one step of this size after `u`; differentiable in all of them."""
    slopes: list[torch.Tensor] = []
    for row, node in zip(table.stages, table.nodes, strict=True):
        stage = u
        for weight, slope in zip(row, slopes, strict=True):
            stage = stage + size * float(weight) * slope
        slopes.append(func(t + float(node) * size, stage))
    for weight, slope in zip(table.weights, slopes, strict=True):
        u = u + size * float(weight) * slope
    return u


def solve_plain(
    func: Callable[..., Any],
    u0: torch.Tensor,
    t: torch.Tensor,
    events: Sequence[PlainEvent],
    table: Tableau,
    step_size: float,
    jumps: Mapping[float, Callable[..., Any]] | None = None,
) -> PlainSolution:
    """Solve through the times `t`, with events in between, which must not happen at one time.

    `jumps` are times at which func is replaced by another function. They are constants, between the first and the last
    output.
    """
    found, pieces = PlainSolution([u0]), jumps or {}
    now, u = t[0], u0
    sides = _sides(events, now, u)
    stops = [*t[1:], *(torch.tensor(time, dtype=torch.float64) for time in pieces if time not in t.tolist())]
    for target in sorted(stops, key=lambda stop: abs((stop - t[0]).item())):
        while now.item() != target.item():
            arrived = True
            begin = now
            plan = steps_between(begin.item(), target.item(), step_size)
            for number in range(len(plan)):
                size = (target - begin) / len(plan)
                start = begin + number * size
                end = target if number == len(plan) - 1 else begin + (number + 1) * size
                after = step(func, table, start, u, end - start)
                happened = [
                    (at, index)
                    for index, event in enumerate(events)
                    if (at := _zero(func, table, event, sides[index], start, u, end, after)) is not None
                ]
                if happened:
                    at, index = min(happened, key=lambda pair: abs(pair[0] - start.item()))
                    now, u = _event(found, func, table, events[index], index, start, u, at)
                    if found.which.count(index) == events[index].terminal:
                        found.end = u
                        return found
                    later = step(func, table, now, u, 1e-7 * (target - now)).detach()
                    sides = _sides(events, now + 1e-7 * (target - now), later)
                    arrived = False
                    break
                now, u = end, after
                sides = _sides(events, now, u)
            if arrived:
                break
        if target.item() in t.tolist():
            found.outputs.append(u)
        func = pieces.get(target.item(), func)
    found.end = u
    return found


def _sides(events: Sequence[PlainEvent], t: torch.Tensor, u: torch.Tensor) -> list[float]:
    with torch.no_grad():
        return [torch.sign(event.g(t, u)).item() for event in events]


def _zero(
    func: Callable[..., Any],
    table: Tableau,
    event: PlainEvent,
    side: float,
    start: torch.Tensor,
    u: torch.Tensor,
    end: torch.Tensor,
    after: torch.Tensor,
) -> float | None:
    """The time of the event in a step, to the last bit; None if there is none."""
    if side == 0 or side * event.g(end, after).item() > 0 or event.direction == side:
        return None
    left, right = start.item(), end.item()
    with torch.no_grad():
        while (middle := (left + right) / 2) not in (left, right):
            state = step(func, table, start, u, middle - start)
            if side * event.g(torch.tensor(middle, dtype=torch.float64), state).item() > 0:
                left = middle
            else:
                right = middle
    return right


def _event(
    found: PlainSolution,
    func: Callable[..., Any],
    table: Tableau,
    event: PlainEvent,
    index: int,
    start: torch.Tensor,
    u: torch.Tensor,
    at: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add an event, with one step of Newton's method as its time, and return its time and the state after it."""
    end = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    value = event.g(end, step(func, table, start, u, end - start))
    (slope,) = torch.autograd.grad(value, end, retain_graph=True)
    fixed = end.detach()
    value = event.g(fixed, step(func, table, start, u, fixed - start))
    time = fixed - (value - value.detach()) / slope
    before = step(func, table, start, u, time - start)
    after = before if event.reset is None else event.reset(time, before)
    found.times.append(time)
    found.which.append(index)
    found.before.append(before)
    found.after.append(after)
    return time, after
