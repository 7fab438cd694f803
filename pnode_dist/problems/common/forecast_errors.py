"""Means of the errors of forecasts, over all that is not missing, on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pnode_dist.distributed.gradients import share_of_mean
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.problems.common.forecast_data import Windows


def mean_share(penalties: torch.Tensor, batch: Windows, mesh: Mesh) -> torch.Tensor:
    """This rank's share of the mean of `penalties`, shaped like the batch's targets. Collective on the world."""
    if batch.weights is None:
        count = math.prod(batch.targets.shape[:2]) * math.prod(batch.samples.partition.global_shape)
        return share_of_mean(penalties.sum(), count, mesh)
    total = mesh.sum(batch.weights.double().sum(), over="state")
    return share_of_mean((penalties * batch.weights).sum(), int(total.item()), mesh)


class Judged(NamedTuple):
    """The mean errors `[lead]` of a forecast, and the seconds that it took without what was done with it."""

    means: torch.Tensor
    seconds: float


class LeadMeans:
    """Means over windows and entries at each lead of a batch, of penalties that are added lead by lead."""

    def __init__(self, batch: Windows) -> None:
        self._batch = batch
        self._totals = torch.zeros(2, batch.steps, dtype=torch.float64)
        self._last = 0

    def add(self, lead: int, starts: Sequence[int], penalties: torch.Tensor) -> None:
        """Add the `penalties` `[window, *local_shape]` of the windows of these numbers at one lead."""
        self._last = max(self._last, lead)
        weights = self._batch.weight(lead)
        if weights is None:
            entries = math.prod(self._batch.samples.partition.global_shape)
            added = torch.stack([penalties.sum(dtype=torch.float64), torch.tensor(len(starts) * entries).double()])
        else:
            weights = weights[list(starts)]
            added = torch.stack([(penalties * weights).sum(dtype=torch.float64), weights.sum(dtype=torch.float64)])
        self._totals[:, lead - 1] += added

    def result(self, mesh: Mesh) -> torch.Tensor:
        """The means `[lead]` up to the last lead that was added. Collective on the state ranks."""
        totals, counts = self._totals[:, : self._last].unbind()
        if self._batch.samples.present is not None:
            totals, counts = mesh.sum(torch.stack([totals, counts]), over="state").unbind()
        else:
            totals = mesh.sum(totals.contiguous(), over="state")
        return torch.as_tensor(totals / counts.clamp(min=1))
