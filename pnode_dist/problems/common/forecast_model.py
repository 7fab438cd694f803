"""The model of a forecast: rollouts of windows by one solve, or by one for each start where times differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import nn

from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.planning import SolveCase
from pnode_dist.problems.common.forecast_data import Windows

Take = Callable[[int, Sequence[int], torch.Tensor], None]
"""A function of a lead, the numbers of some windows, and their states `[window, *local_shape]` at that lead."""


@dataclass(frozen=True)
class Group:
    """Windows of a batch, by number, that are solved together at the same times; f is given `args` too."""

    windows: tuple[int, ...]
    times: tuple[float, ...]
    args: tuple[Any, ...] = ()


class Rollouts(nn.Module):
    """Rollouts of windows: `model(windows)` is `[lead, window, *local_shape]`. Collective on the partition's ranks.

    A `time_dependent` right-hand side is given the windows' own times, another one times that begin at 0.
    """

    time_dependent = False
    evaluated_in: torch.dtype | None = None
    """The dtype of the windows that an evaluation gives it; None: the configured one."""

    def solve_of(self, count: int) -> NeuralODE:
        """The solve of so many windows."""
        raise NotImplementedError

    def initial(self, batch: Windows) -> torch.Tensor:
        """The states that the solves of the windows start from."""
        return batch.initial

    def case(self, batch: Windows, initial: torch.Tensor, group: Group) -> SolveCase:
        """The solve of one group of windows, from their part of the `initial` states of the batch."""
        state = initial if len(group.windows) == len(initial) else initial[list(group.windows)]
        return SolveCase(self.solve_of(len(group.windows)), state, group.times, group.args)

    def first_case(self, batch: Windows) -> SolveCase:
        """The first solve of a batch."""
        return self.case(batch, self.initial(batch), next(self.groups(batch)))

    def forward(self, batch: Windows) -> torch.Tensor:
        """The states at the leads 1, 2, ... of the windows' targets."""
        initial, groups = self.initial(batch), list(self.groups(batch))
        rollouts: list[torch.Tensor] = []
        for group in groups:
            case = self.case(batch, initial, group)
            rollouts.append(case.solve(case.state, case.times, *case.args)[1:])
        if len(rollouts) == 1:
            return rollouts[0]
        order = torch.tensor([number for group in groups for number in group.windows]).argsort()
        return torch.cat(rollouts, dim=1)[:, order]

    def stream(self, batch: Windows, take: Take) -> None:
        """Hand the states of each lead to `take`, in place of `forward`. No gradient.

        A subclass with a `forward` of its own is computed whole, unless it replaces this method by `follow`.
        """
        if type(self).forward is Rollouts.forward:
            self.follow(batch, take)
            return
        for lead, states in zip(batch.leads, self(batch), strict=True):
            take(lead, range(len(batch.starts)), states)

    def follow(self, batch: Windows, take: Take) -> None:
        """Solve the windows, and hand the states of each lead to `take` while the solves go on. No gradient."""
        initial = self.initial(batch)
        for group in self.groups(batch):
            case = self.case(batch, initial, group)
            with consumed(case.solve, group.windows, take):
                case.solve(case.state, case.times, *case.args)

    def groups(self, batch: Windows) -> Iterator[Group]:
        """The windows that can be solved together; one group without windows for an empty batch."""
        if not batch.starts:
            yield Group((), self._from_zero(batch))
            return
        if not self.time_dependent and batch.samples.is_regular:
            # Differences of later times are rounded, which would make groups of what belongs together.
            yield Group(tuple(range(len(batch.starts))), self._from_zero(batch))
            return
        found: dict[tuple[float, ...], list[int]] = {}
        for number, times in enumerate(batch.times):
            start = 0.0 if self.time_dependent else times[0]
            found.setdefault(tuple(time - start for time in times), []).append(number)
        for times, numbers in found.items():
            yield Group(tuple(numbers), times)

    def _from_zero(self, batch: Windows) -> tuple[float, ...]:
        """The times of the first window, from 0 on."""
        times = batch.samples.times[: batch.steps + 1]
        return tuple((times - times[0]).tolist())


@contextmanager
def consumed(solve: NeuralODE, windows: Sequence[int], take: Take) -> Iterator[None]:
    """Let the outputs of `solve` after the first, which is the initial state, be given to `take`."""
    leads = count()

    def consume(time: float, states: torch.Tensor) -> None:
        if lead := next(leads):
            take(lead, windows, states)

    before = solve.on_output
    solve.on_output = consume
    try:
        yield
    finally:
        solve.on_output = before


class ForecastModel(Rollouts):
    """Rollouts by one `solve`, however many windows there are."""

    def __init__(self, solve: NeuralODE, time_dependent: bool = False) -> None:
        super().__init__()
        self.solve = solve
        self.time_dependent = time_dependent

    def case(self, batch: Windows, initial: torch.Tensor, group: Group) -> SolveCase:
        """The solve of one group of windows, on the partition of the windows."""
        # Windows for training and for validation may be spread differently.
        self.solve.partition = batch.samples.partition
        return super().case(batch, initial, group)

    def solve_of(self, count: int) -> NeuralODE:
        """The solve, of any number of windows."""
        return self.solve
