"""The choice of a solve's outputs: the states at the output times, at steps, or at the last time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.time_grid import TimeGrid

Save = str | int | Sequence[str | int]
"""`"times"`, `"last"`, `"steps"`, a number n for every n-th step, or several of these."""
_KINDS = ("times", "last", "steps")
_ALLOWED = "must be 'times', 'last', 'steps', a number n for every n-th step, or a tuple of these"


class Integrated(NamedTuple):
    """The outputs `u` of a solve, and the `integral` of its running cost from the first time up to those of `u`."""

    u: Any
    integral: Any


class Saved(NamedTuple):
    """The outputs of a solve that saves steps: their times `[n]`, and the states or observations `[n, ...]`."""

    t: torch.Tensor
    u: Any


@dataclass(frozen=True)
class Saving:
    """The outputs of a solve: at the output `times`, at the `last` time, and at `every` n-th step; 0 means none.

    The initial state is step 0.
    """

    times: bool
    last: bool
    every: int

    @property
    def only_last(self) -> bool:
        """True if the only output is that at the last time. It has no axis of times."""
        return self.last and not (self.times or self.every)

    @property
    def has_steps(self) -> bool:
        """True if the outputs are not at known times, so that a solve returns their times as well."""
        return self.every > 0 or (self.times and self.last)

    def saves(self, step: int, output: int | None, is_last: bool) -> bool:
        """Return True for the state before `step`, which is the one at output time `output`, if given."""
        by_step = self.every > 0 and step % self.every == 0
        return by_step or (self.times and output is not None) or (self.last and is_last)

    def of_grid(self, grid: TimeGrid | None) -> dict[int, int]:
        """Return the number of the output of each step that is saved. `grid` is None for a single time."""
        if grid is None:
            return {0: 0}
        if not self.every:
            return {grid.steps: 0} if not self.times else dict(grid.outputs)
        steps = [n for n in range(grid.steps + 1) if self.saves(n, grid.outputs.get(n), n == grid.steps)]
        return {step: number for number, step in enumerate(steps)}

    def __str__(self) -> str:
        chosen = [name for name, on in (("times", self.times), ("last", self.last)) if on]
        return ", ".join([*chosen, *([f"every {self.every} steps"] if self.every else [])])


AT_TIMES = Saving(times=True, last=False, every=0)
"""The default: the states at the output times."""


def saving(save: Save, last_only: bool) -> Saving:
    """Return the choice of outputs. Raises `ConfigurationError` for an unknown one."""
    kinds: list[Any] = [save] if isinstance(save, str | int) else list(save) if isinstance(save, Sequence) else [None]
    every = 0
    for kind in kinds:
        number = 1 if kind == "steps" else kind if isinstance(kind, int) and not isinstance(kind, bool) else 0
        if not (kind in _KINDS or number > 0):
            raise ConfigurationError(f"save = {save!r}: {_ALLOWED}")
        if number and every:
            raise ConfigurationError(f"save = {save!r}: must name one number of steps at most")
        every = every or number
    if not kinds:
        raise ConfigurationError(f"save = {save!r}: {_ALLOWED}")
    found = Saving("times" in kinds, "last" in kinds, every)
    if not last_only:
        return found
    if found not in (AT_TIMES, Saving(False, True, 0)):
        raise ConfigurationError(f"last_only = True and save = {save!r}: must be one of them")
    return Saving(False, True, 0)


def times_of_saved(steps: Sequence[int], grid: TimeGrid | None, t: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """Return the times of the states before these steps, as a function of the output times `t`.

    Each step is a fixed share of its interval between output times.
    """
    times = t if isinstance(t, torch.Tensor) else torch.tensor(list(t), dtype=torch.float64)
    if grid is None:
        return times[:1].clone()
    at = times.detach().double().tolist()
    ends = {**grid.jumps, **{step: at[number] for step, number in grid.outputs.items()}}
    bounds = sorted(ends)
    numbers, shares, exact = [], [], []
    for step in steps:
        place = min(bisect_right(bounds, step) - 1, len(bounds) - 2)
        first, last = bounds[place : place + 2]
        time = ends[step] if step in ends else grid.starts[step]
        share = (time - ends[first]) / (ends[last] - ends[first])
        # A jump that is no output time does not move.
        shares.append([(1 - share) * (first in grid.outputs), share * (last in grid.outputs)])
        numbers.append([grid.outputs.get(end, 0) for end in (first, last)])
        exact.append(time)
    moving = (torch.tensor(shares, dtype=torch.float64).to(times) * times[torch.tensor(numbers)]).sum(-1)
    return torch.tensor(exact, dtype=torch.float64).to(times) + (moving - moving.detach())
