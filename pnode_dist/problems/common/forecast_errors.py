"""Means of the errors of forecasts, over all that is not missing, on all ranks."""

from __future__ import annotations

import math

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


def means_by_lead(penalties: torch.Tensor, batch: Windows, mesh: Mesh) -> torch.Tensor:
    """The mean `[lead]` of `penalties` `[lead, window, *local_shape]` of a batch. Collective on the state ranks."""
    penalties = penalties.flatten(1)
    if batch.weights is None:
        count = batch.targets.shape[1] * math.prod(batch.samples.partition.global_shape)
        total: torch.Tensor = mesh.sum(penalties.sum(dim=1), over="state")
        return total / count
    weights = batch.weights.flatten(1)
    sums = torch.stack([(penalties * weights).sum(dim=1), weights.sum(dim=1)])
    totals, counts = mesh.sum(sums, over="state").unbind()
    return torch.as_tensor(totals / counts.clamp(min=1))
