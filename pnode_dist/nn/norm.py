"""Normalisation of a partitioned field, with the statistics of the whole field.

Variances are means of squared departures from the mean, in a second sum over the ranks. The difference of two means of
squares would lose its digits for a field that varies little about a large mean.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from pnode_dist.exchange import global_sum
from pnode_dist.nn.field import require_axes, require_block
from pnode_dist.partition.grid import GridPartition
from pnode_dist.system.torch_internals import BatchNorm


def points(partition: GridPartition) -> int:
    """Return the number of points of the whole grid."""
    return math.prod(partition.shape)


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm on a partitioned, channels-last field `[..., *local, num_channels]`.

    Each sample is normalised over all points of the grid and the channels of a group; as many groups as there are
    channels make an instance norm. (torch.nn.LayerNorm over the channels of each point needs no communication, and can
    be used as it is.) Arguments, names and values of the parameters are torch's, so a state_dict goes either way.
    `forward` is collective on the partition's communicator, and so is its backward.
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
        require_block("GroupNorm", x, self.partition)
        in_group = self.num_channels // self.num_groups
        groups = x.reshape(*x.shape[:-1], self.num_groups, in_group)
        axes = (*_grid_axes(self.partition, behind=2), -1)
        normalised = _normalised(groups, axes, points(self.partition) * in_group, self.eps, self.partition)
        return _scaled(normalised.reshape(x.shape), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over a whole partitioned field: each sample over all points of the grid and all channels.

    `[..., *local, num_channels]` -> the same. `weight` and `bias` are those of
    `torch.nn.LayerNorm((*partition.shape, num_channels))`, whole on every rank, which uses its block of them and
    gets the gradient of that block; with `channels_first` they are those of a torch module that has its channels before
    the axes of the grid. `forward` is collective on the partition's communicator, and so is its backward.
    """

    def __init__(
        self,
        partition: GridPartition,
        num_channels: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        channels_first: bool = False,
    ) -> None:
        shape = (num_channels, *partition.shape) if channels_first else (*partition.shape, num_channels)
        super().__init__(shape, eps, elementwise_affine, bias, dtype=dtype)
        self.partition = partition
        self.channels_first = channels_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise. Collective on the partition's communicator."""
        require_block("LayerNorm", x, self.partition)
        axes = (*_grid_axes(self.partition, behind=1), -1)
        count = points(self.partition) * x.shape[-1]
        normalised = _normalised(x, axes, count, self.eps, self.partition)
        return _scaled(normalised, self._block(self.weight), self._block(self.bias))

    def _block(self, whole: torch.Tensor | None) -> torch.Tensor | None:
        if whole is None:
            return None
        ordered = whole.movedim(0, -1) if self.channels_first else whole
        return ordered[tuple(slice(*owned) for owned in self.partition.owned)]


class _BatchNorm(BatchNorm):
    """torch.nn's batch norm on a partitioned, channels-last field `[..., *local, num_features]`.

    In training each channel is normalised over all points of the grid and all leading axes; the running statistics,
    which are used in evaluation, are the same on all ranks of the state. Arguments, parameters, buffers and their names
    are torch's. `forward` is collective on the partition's communicator in training, and so is its backward. Raises
    `ConfigurationError` for a grid of other axes, and `ValueError` in training for a single point of a single sample.

    A right-hand side is evaluated several times in a step, and again if the step is recomputed. The running statistics
    follow all of these evaluations, so they depend on the checkpoint budget. Gradients do not.
    """

    _axes: ClassVar[int]

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
        require_axes(type(self).__name__, partition, self._axes)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, dtype=dtype)
        self.partition = partition

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise. Collective on the partition's communicator in training."""
        name = type(self).__name__
        require_block(name, x, self.partition)
        if not self.training and self.running_mean is not None and self.running_var is not None:
            departure, variance = x - self.running_mean, self.running_var
        else:
            count = points(self.partition) * math.prod(x.shape[: -1 - self._axes])
            if count == 1:
                raise ValueError(f"{name}: one point of one sample has no variance: give it more of either")
            axes = tuple(range(x.dim() - 1))
            mean = global_sum(x.sum(axes), self.partition.comm) / count
            departure = x - mean
            variance = global_sum(departure.square().sum(axes), self.partition.comm) / count
            if self.training and self.running_mean is not None:
                follow(self, mean.detach(), variance.detach() * count / (count - 1))
        return _scaled(departure * torch.rsqrt(variance + self.eps), self.weight, self.bias)


class BatchNorm1d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    _axes = 1


class BatchNorm2d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    _axes = 2


class BatchNorm3d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    _axes = 3


def follow(layer: BatchNorm, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Update a batch norm's running statistics by those of a batch, `[num_features]`, with unbiased variance."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    for running, found in ((layer.running_mean, mean), (layer.running_var, variance)):
        if layer.momentum is None:
            running.lerp_(found.to(running.dtype), layer.num_batches_tracked.double().reciprocal().to(running.dtype))
        else:
            running.lerp_(found.to(running.dtype), layer.momentum)


class GlobalMean(nn.Module):
    """The mean over all points of the grid, `[..., *local, channels]` -> `[..., channels]` on every rank.

    The result is the same on all ranks. A loss made of it alone is to be weighted so that the ranks' shares add up to
    it once (see `pnode_dist.exchange.global_sum`); what a right-hand side makes of it for its own points is not.
    `forward` is collective on the partition's communicator, and so is its backward.
    """

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        self.partition = partition

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Average. Collective on the partition's communicator."""
        require_block("GlobalMean", x, self.partition)
        return global_sum(x.sum(_grid_axes(self.partition, behind=1)), self.partition.comm) / points(self.partition)


def _grid_axes(partition: GridPartition, behind: int) -> tuple[int, ...]:
    """Return the grid's axes, with `behind` other axes after them."""
    return tuple(range(-len(partition.shape) - behind, -behind))


def _normalised(
    x: torch.Tensor, axes: tuple[int, ...], count: int, eps: float, partition: GridPartition
) -> torch.Tensor:
    """Normalise by mean and deviation over `axes`, with `count` values on all ranks."""
    mean = global_sum(x.sum(axes, keepdim=True), partition.comm) / count
    departure = x - mean
    variance = global_sum(departure.square().sum(axes, keepdim=True), partition.comm) / count
    return departure * torch.rsqrt(variance + eps)


def _scaled(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias
