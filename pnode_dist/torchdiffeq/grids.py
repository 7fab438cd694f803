"""The steps of torchdiffeq's methods with given steps, and the outputs between them.

torchdiffeq divides the whole solve into steps of one size, of which the last one is shorter. At times within a step it
interpolates.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.layout import Parts, State
from pnode_dist.ode.time_grid import TimeGrid
from pnode_dist.torchdiffeq.options import FixedOptions


@dataclass(frozen=True)
class Brackets:
    """The steps of a solve and the places of its outputs in them.

    `steps` are the steps, and `times` the times of the solve: the ends of those steps that hold an output. `before` and
    `after` are the numbers of the times around each output, equal where an output is at a time. `shares` are the places
    of the outputs between them, from 0 to 1.
    """

    steps: TimeGrid
    times: torch.Tensor
    before: list[int]
    after: list[int]
    shares: torch.Tensor

    @property
    def interpolates(self) -> bool:
        """True if some output lies within a step."""
        return self.before != self.after

    @property
    def is_plain(self) -> bool:
        """True if the outputs are the times, one after the other."""
        return not self.interpolates and self.after == list(range(len(self.times)))


def brackets(func: Any, y0: State, t: torch.Tensor, options: FixedOptions) -> Brackets:
    """Return the steps that the options ask for, and the place of each time of `t` in them.

    Raises `ConfigurationError` if `grid_constructor` returns anything but a grid from `t[0]` to `t[-1]`.
    """
    grid = _grid(func, y0, t, options)
    # Not tolist(), which fails with torch 2.6 within a transform.
    nodes, wanted = ([float(time) for time in times.detach()] for times in (grid, t))
    sign = 1.0 if wanted[-1] >= wanted[0] else -1.0
    ends: list[int] = []
    for when in wanted:
        end = ends[-1] if ends else 0
        while sign * nodes[end] < sign * when:
            end += 1
        ends.append(end)
    # A cubic has a slope in time also where a step ends.
    always = t.requires_grad and options.interp == "cubic"
    lands = [end == 0 or (nodes[end] == when and not always) for end, when in zip(ends, wanted, strict=True)]
    starts = [end if at_end else end - 1 for end, at_end in zip(ends, lands, strict=True)]
    # Every node is a time if the nodes depend on t: a step within an interval moves with the ends of the interval.
    every = grid.requires_grad or options.perturb
    kept = list(range(len(nodes))) if every else sorted({0, len(nodes) - 1, *starts, *ends})
    numbers = {node: number for number, node in enumerate(kept)}
    sizes = tuple(end - begin for begin, end in pairwise(nodes))
    before, after = [numbers[node] for node in starts], [numbers[node] for node in ends]
    times = grid[kept]
    left, right = times[before], times[after]
    shares = (t - left) / torch.where(left == right, torch.ones_like(left), right - left)
    return Brackets(TimeGrid(tuple(nodes[:-1]), sizes, numbers), times, before, after, shares)


def _grid(func: Any, y0: State, t: torch.Tensor, options: FixedOptions) -> torch.Tensor:
    if options.grid_constructor is not None:
        grid = options.grid_constructor(func, y0, t)
        _check(grid, t)
        return grid.to(t.device)
    if options.step_size is None or len(t) == 1:
        return t
    # In the type of t, as torchdiffeq: the number of steps depends on rounding.
    sign = 1.0 if t[-1] > t[0] else -1.0
    count = int(torch.ceil((t[-1] - t[0]).detach() * sign / options.step_size + 1).item())
    nodes = torch.arange(0, count, dtype=t.dtype, device=t.device) * (sign * options.step_size) + t[0]
    return torch.cat([nodes[:-1], t[-1:]])


def _check(grid: Any, t: torch.Tensor) -> None:
    if not isinstance(grid, torch.Tensor) or grid.dim() != 1 or len(grid) < 1:
        raise ConfigurationError("options: grid_constructor must return a one-dimensional tensor of times")
    if grid[0] != t[0] or grid[-1] != t[-1]:
        raise ConfigurationError(
            f"options: grid_constructor must return times from t[0] = {t[0].item():g} to t[-1] = {t[-1].item():g}, got "
            f"{grid[0].item():g} to {grid[-1].item():g}"
        )
    steps = grid.diff()
    if not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise ConfigurationError(
            "options: grid_constructor must return times that increase or decrease strictly like t"
        )


def outputs_at(places: Brackets, func: Any, states: State, interp: str) -> State:
    """Return the outputs from the states at the times of the solve: those states, or interpolated ones.

    `cubic` evaluates func at both ends of the steps that hold an output.
    """
    if isinstance(states, torch.Tensor):
        return _interpolated(places, (states,), _slopes(places, func, states) if interp == "cubic" else None)[0]
    return _interpolated(places, states, _slopes(places, func, states) if interp == "cubic" else None)


def _slopes(places: Brackets, func: Any, states: State) -> Parts | None:
    """Return func at all times of the solve, as parts of the state."""
    if not places.interpolates:
        return None
    found = []
    for number, when in enumerate(places.times):
        state = states[number] if isinstance(states, torch.Tensor) else tuple(part[number] for part in states)
        value = func(when.to(_type_of(states)), state)
        found.append((value,) if isinstance(value, torch.Tensor) else tuple(value))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


def _type_of(states: State) -> torch.dtype:
    return states.dtype if isinstance(states, torch.Tensor) else states[0].dtype


def _interpolated(places: Brackets, parts: Parts, slopes: Parts | None) -> Parts:
    if places.is_plain:
        return parts
    found = []
    lengths = places.times[places.after] - places.times[places.before]
    for number, part in enumerate(parts):
        start, end = part[places.before], part[places.after]
        if places.interpolates:
            column = (len(places.after),) + (1,) * (part.dim() - 1)
            share = places.shares.to(part.dtype).reshape(column)
            if slopes is None:
                between = start + share * (end - start)
            else:
                length = lengths.to(part.dtype).reshape(column)
                between = _hermite(
                    share, start, end, length * slopes[number][places.before], length * slopes[number][places.after]
                )
            inside = torch.tensor(
                [b != a for b, a in zip(places.before, places.after, strict=True)], device=part.device
            )
            end = torch.where(inside.reshape(column), between, end)
        found.append(end)
    return tuple(found)


def _hermite(
    share: torch.Tensor, start: torch.Tensor, end: torch.Tensor, rise: torch.Tensor, fall: torch.Tensor
) -> torch.Tensor:
    """Return the cubic with these values and rises per step at both ends."""
    rest = 1 - share
    return (
        (1 + 2 * share) * rest**2 * start
        + share * rest**2 * rise
        + share**2 * (3 - 2 * share) * end
        - share**2 * rest * fall
    )
