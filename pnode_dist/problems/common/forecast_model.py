"""The model of a forecast: rollouts of windows by one solve, or by one for each start where times differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.planning import SolveCase
from pnode_dist.problems.common.forecast_data import Windows


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
        times = batch.samples.times[: len(batch.targets) + 1]
        return tuple((times - times[0]).tolist())


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
