"""Normalisation of a field that is split over ranks, with the statistics of the whole field.

Variances are means of squared departures from the mean, in a second sum over the ranks: the difference of two means
of squares would lose its digits where a field varies little about a large mean.
"""

from __future__ import annotations

import torch
from torch import nn

from pnode_dist.exchange import global_sum
from pnode_dist.partition.grid import GridPartition


def points(partition: GridPartition) -> int:
    """The number of points of the whole grid."""
    return partition.shape[0] * partition.shape[1]


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm on a partitioned, channels-last field `[..., ny_local, nx_local, num_channels]`.

    Each sample is normalised over all points of the grid and the channels of a group; one group is what is often
    called a layer norm of a field, and as many as there are channels an instance norm. (torch.nn.LayerNorm over the
    channels of each point needs no communication, and can be used as it is.) Arguments, names and values of the
    parameters are torch's, so a state_dict goes either way. `forward` is collective on the partition's communicator,
    and so is its backward.
    """

    def __init__(
        self,
        partition: GridPartition,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, dtype=dtype)
        self.partition = partition

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise. Collective on the partition's communicator."""
        in_group = self.num_channels // self.num_groups
        groups = x.reshape(*x.shape[:-1], self.num_groups, in_group)
        axes = (-4, -3, -1)
        count = points(self.partition) * in_group
        mean = global_sum(groups.sum(axes, keepdim=True), self.partition.comm) / count
        departure = groups - mean
        variance = global_sum(departure.square().sum(axes, keepdim=True), self.partition.comm) / count
        return _scaled((departure * torch.rsqrt(variance + self.eps)).reshape(x.shape), self.weight, self.bias)


class BatchNorm2d(nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on a partitioned, channels-last field `[..., ny_local, nx_local, num_features]`.

    In training each channel is normalised over all points of the grid and all leading axes; the running statistics,
    which are used in evaluation, are the same on all ranks of the state. Arguments, parameters, buffers and their names
    are torch's. `forward` is collective on the partition's communicator in training, and so is its backward. Raises
    `ValueError` in training for a single point of a single sample.

    A right-hand side is evaluated several times a step, and again where a step is run again: the running statistics
    follow all of these evaluations, so they depend on the budget of the trajectory, which gradients do not.
    """

    def __init__(
        self,
        partition: GridPartition,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, dtype=dtype)
        self.partition = partition

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise. Collective on the partition's communicator in training."""
        if not self.training and self.running_mean is not None and self.running_var is not None:
            departure, variance = x - self.running_mean, self.running_var
        else:
            count = points(self.partition) * x[..., 0, 0, 0].numel()
            if count == 1:
                raise ValueError("BatchNorm2d: one point of one sample has no variance: give it more of either")
            axes = tuple(range(x.dim() - 1))
            mean = global_sum(x.sum(axes), self.partition.comm) / count
            departure = x - mean
            variance = global_sum(departure.square().sum(axes), self.partition.comm) / count
            if self.training and self.running_mean is not None:
                self._follow(mean.detach(), variance.detach() * count / (count - 1))
        return _scaled(departure * torch.rsqrt(variance + self.eps), self.weight, self.bias)

    def _follow(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class GlobalMean(nn.Module):
    """The mean over all points of the grid, `[..., ny_local, nx_local, channels]` -> `[..., channels]` on every rank.

    The result is the same on all ranks. A loss made of it alone is to be weighted so that the ranks' shares add up to
    it once (see `pnode_dist.exchange.global_sum`); what a right-hand side makes of it for its own points is not.
    `forward` is collective on the partition's communicator, and so is its backward.
    """

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        self.partition = partition

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Average. Collective on the partition's communicator."""
        return global_sum(x.sum((-3, -2)), self.partition.comm) / points(self.partition)


def _scaled(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias
