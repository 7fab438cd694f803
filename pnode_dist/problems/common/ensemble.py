"""Ensembles: trajectories of a small system from many initial states, spread over ranks, and stretches of them.

A rank owns whole trajectories, numbered as in a `BatchPartition`. Those to learn from and those held out are two
ensembles, each with a partition of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from pnode_dist.distributed.gradients import share_of_mean
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.batch import BatchPartition


@dataclass(frozen=True)
class Ensemble:
    """This rank's part of trajectories that are sampled at the same times.

    `values` is `[time, trajectory_local, component]` in float64, `partition` is over the trajectories.
    """

    partition: BatchPartition
    values: torch.Tensor

    @property
    def times(self) -> int:
        """Samples of a trajectory."""
        return self.values.shape[0]


@dataclass(frozen=True)
class Windows:
    """Stretches of all trajectories of an ensemble that are solved together.

    `initial` `[start, trajectory_local, component]` are the states of the samples number `starts`, and `targets`
    `[lead, start, trajectory_local, component]` those 1, 2, ... samples later. `partition` is over the trajectories.
    """

    starts: tuple[int, ...]
    initial: torch.Tensor
    targets: torch.Tensor
    partition: BatchPartition


def windows(ensemble: Ensemble, starts: Sequence[int], leads: int, dtype: torch.dtype) -> Windows:
    """The windows of `leads` samples that begin at `starts`, in `dtype`."""
    first = torch.tensor(tuple(starts), dtype=torch.int64)
    targets = torch.stack([ensemble.values[first + lead] for lead in range(1, leads + 1)])
    return Windows(tuple(starts), ensemble.values[first].to(dtype), targets.to(dtype), ensemble.partition)


def spread(values: npt.NDArray[Any], partition: BatchPartition) -> Ensemble:
    """This rank's part of trajectories `[time, trajectory, component]` that all ranks have computed. Not collective."""
    begin, end = partition.owned
    return Ensemble(partition, torch.from_numpy(values[:, begin:end].copy()))


def mean_share(values: torch.Tensor, partition: BatchPartition, mesh: Mesh) -> torch.Tensor:
    """This rank's share of the mean of `values` `[..., trajectory_local, component]` over everything on all ranks.

    Collective on the data replicas.
    """
    return share_of_mean(values.sum(), math.prod(values.shape[:-2]) * math.prod(partition.global_shape), mesh)


def means(values: torch.Tensor, partition: BatchPartition, mesh: Mesh) -> torch.Tensor:
    """The means `[...]` of `values` `[..., trajectory_local, component]` over trajectories and components.

    Collective on the state ranks.
    """
    total: torch.Tensor = mesh.sum(values.sum(dim=(-2, -1)), over="state")
    return total / math.prod(partition.global_shape)
