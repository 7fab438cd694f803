"""Solves up to an event: the `event_fn` of torchdiffeq, and `odeint_event`.

torchdiffeq solves without a last time. Here successive solves, each twice as long, search for the event.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError, EventError
from pnode_dist.hybrid.event import Event
from pnode_dist.hybrid.event_solve import located
from pnode_dist.ode.rhs.layout import State
from pnode_dist.ode.settings import CallSettings
from pnode_dist.torchdiffeq.options import AdaptiveOptions, FixedOptions
from pnode_dist.torchdiffeq.pieces import Piece, within

_MOST_STEPS = 20_000
_FIRST_STEPS = 64
_DOUBLINGS = 60


def until_event(
    func: Callable[..., Any],
    y0: State,
    t: torch.Tensor,
    event: Event,
    settings: CallSettings,
    options: AdaptiveOptions | FixedOptions,
) -> tuple[torch.Tensor, State]:
    """Return the time of the event, and the states at `t[0]` and there, `[2, *y0.shape]`. Collective.

    Both are differentiable. Of `t` only the first time, and the direction, are used. Raises `ConfigurationError` for
    options without an effect, and `EventError` if there is no event after very many steps.
    """
    backward = len(t) > 1 and bool(t[-1] < t[0])
    # An event's time is the rounding of the state over its speed: keep that of func's type alone.
    settings = replace(settings, state_dtype=torch.float64)
    start, y, last = t[0].to(torch.float64), y0, y0
    for length, stops in _windows(start.item(), backward, options):
        end = start + math.copysign(length, -1.0 if backward else 1.0)
        inside = torch.tensor(stops.inside, dtype=torch.float64, device=t.device)
        times = torch.cat([start.reshape(1), inside, end.reshape(1)])
        piece = Piece(times.detach(), [], stops.from_jump, stops.to_jump)
        solution = located(within(func, piece), y, times, event, settings)
        start, y, last = solution.t_end, solution.u_end, solution.u_end
        if solution.which:
            return start.to(t), _stacked(y0, last)
    raise EventError(f"event_fn: no event from t = {t[0].item():g} to {start.item():g}")


@dataclass(frozen=True)
class _Stops:
    """The times in a window at which steps end, and whether f jumps at its first or last time."""

    inside: list[float]
    from_jump: bool
    to_jump: bool


def _windows(start: float, backward: bool, options: AdaptiveOptions | FixedOptions) -> Iterator[tuple[float, _Stops]]:
    """Yield the lengths of successive solves, each ended by a jump of f, with the stops in it."""
    sign = -1.0 if backward else 1.0
    if isinstance(options, FixedOptions):
        if options.step_size is None or options.perturb:
            wrong = "perturb" if options.perturb else "grid_constructor" if options.grid_constructor else "None"
            raise ConfigurationError(
                f"event_fn: a method with given steps needs options={{'step_size': ...}} alone, got {wrong}: the end "
                "of the solve is not known"
            )
        steps, taken = _FIRST_STEPS, 0
        while taken < _MOST_STEPS:
            yield steps * options.step_size, _Stops([], False, False)
            taken, steps = taken + steps, 2 * steps
        return
    jumps = sorted(sign * time for time in options.jump_t if sign * time > sign * start)
    stops = sorted(sign * time for time in options.step_t if sign * time > sign * start)
    now, length, from_jump = sign * start, max(1.0, abs(start) * 1e-6), start in options.jump_t
    for _ in range(_DOUBLINGS + len(jumps)):
        ahead = [time for time in jumps if time > now]
        end = min([now + length, *ahead])
        inside = [sign * time for time in stops if now < time < end]
        to_jump = end in ahead
        yield end - now, _Stops(inside, from_jump, to_jump)
        length = length if to_jump else 2 * length
        now, from_jump = end, to_jump


def event_of(event_fn: Any, y0: State, start: torch.Tensor) -> Event:
    """Return the event of `event_fn`, whose entries may be several: it is at the first that changes its sign.

    Raises `ConfigurationError` for anything but a function that returns a real tensor without zeros at the start.
    """
    if not callable(event_fn):
        raise ConfigurationError(f"event_fn = {event_fn!r}: must be a function of t and y")
    with torch.no_grad():
        first = event_fn(start, y0)
    if not isinstance(first, torch.Tensor) or first.is_complex():
        kind = f"a {first.dtype} tensor" if isinstance(first, torch.Tensor) else type(first).__name__
        raise ConfigurationError(f"event_fn returned {kind}: must return a real tensor")
    if first.numel() == 1:
        return Event(event_fn, terminal=True, name="event_fn", over="min")
    signs = first.sign()
    if not bool(signs.abs().all()):
        raise ConfigurationError(
            "event_fn: an entry is zero at t[0], where no sign can be told: begin beside the event"
        )

    def least(t: torch.Tensor, y: State) -> torch.Tensor:
        return torch.min(event_fn(t, y) * signs)

    return Event(least, direction=-1, terminal=True, name="event_fn", over="min")


def _stacked(first: State, last: State) -> State:
    if isinstance(first, torch.Tensor) and isinstance(last, torch.Tensor):
        return torch.stack([first, last])
    return tuple(torch.stack(parts) for parts in zip(first, last, strict=True))
