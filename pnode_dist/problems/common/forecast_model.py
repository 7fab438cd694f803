"""The model of a forecast: rollouts of windows by one solve, or by one for each start where times differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.problems.common.forecast_data import Windows


@dataclass(frozen=True)
class Group:
    """Windows of a batch, by number, that are solved together at the same times."""

    windows: tuple[int, ...]
    times: tuple[float, ...]


class ForecastModel(nn.Module):
    """Rollouts of windows: `model(windows)` is `[lead, window, *local_shape]`. Collective on the partition's ranks.

    `solve` is the NeuralODE. A `time_dependent` right-hand side is given the windows' own times, another one times that
    begin at 0. With `mean` and `deviation` the solve is of states that are normalised by them.
    """

    mean: torch.Tensor | None
    deviation: torch.Tensor | None

    def __init__(
        self,
        solve: NeuralODE,
        time_dependent: bool = False,
        mean: torch.Tensor | None = None,
        deviation: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.solve = solve
        self.time_dependent = time_dependent
        # Made from the data, so they are not parameters of the run.
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)

    def forward(self, batch: Windows) -> torch.Tensor:
        """The states at the leads 1, 2, ... of the windows' targets."""
        # Windows for training and for validation may be spread differently.
        self.solve.partition = batch.samples.partition
        initial = self.encoded(batch.initial)
        groups = list(self.groups(batch))
        rollouts = [self.solve(initial[list(group.windows)], group.times)[1:] for group in groups]
        if len(rollouts) == 1:
            return self.decoded(rollouts[0])
        order = torch.tensor([number for group in groups for number in group.windows]).argsort()
        return self.decoded(torch.cat(rollouts, dim=1)[:, order])

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

    def encoded(self, states: torch.Tensor) -> torch.Tensor:
        """States as they are solved for."""
        if self.mean is None or self.deviation is None:
            return states
        return (states - self.mean.to(states)) / self.deviation.to(states)

    def decoded(self, states: torch.Tensor) -> torch.Tensor:
        """States in the data's units."""
        if self.mean is None or self.deviation is None:
            return states
        return states * self.deviation.to(states) + self.mean.to(states)
