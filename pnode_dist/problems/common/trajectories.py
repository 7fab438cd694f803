"""Trajectories on a partition, and the stretches of them that a model is trained on and judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Start = tuple[int, int]
"""A trajectory and a sample of it."""


@dataclass(frozen=True)
class Trajectories:
    """This rank's part of all trajectories: samples `interval` apart, the first `training` of them to learn from.

    `values` `[trajectory, time, *local_shape]`, float64, are in units of the `scale`.
    """

    values: torch.Tensor
    scale: float
    training: int
    interval: float

    @property
    def times(self) -> int:
        """Samples of a trajectory."""
        return self.values.shape[1]

    def starts(self, window: int) -> list[Start]:
        """The starts of all windows of `window` samples ahead in the trajectories to learn from."""
        return [(number, first) for number in range(self.training) for first in range(self.times - window)]


@dataclass(frozen=True)
class Windows:
    """Stretches of trajectories that are solved together.

    `initial` `[window, *local_shape]` are the states at `starts`, and `targets` `[lead, window, *local_shape]` those 1,
    2, ... samples later, `interval` apart.
    """

    starts: tuple[Start, ...]
    initial: torch.Tensor
    targets: torch.Tensor
    interval: float

    @property
    def times(self) -> list[float]:
        """0 and the times of the targets."""
        return [number * self.interval for number in range(len(self.targets) + 1)]


def windows(data: Trajectories, starts: Sequence[Start], steps: int, dtype: torch.dtype) -> Windows:
    """The windows of `steps` samples that begin at `starts`, in `dtype`."""
    trajectory, first = torch.tensor(tuple(starts), dtype=torch.int64).reshape(-1, 2).unbind(1)
    targets = torch.stack([data.values[trajectory, first + lead] for lead in range(1, steps + 1)])
    return Windows(tuple(starts), data.values[trajectory, first].to(dtype), targets.to(dtype), data.interval)
