"""Pooling from a partitioned grid to a coarser one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from pnode_dist.nn.field import channels_first, channels_last, for_each_axis, require_axes, require_block
from pnode_dist.partition.grid import GridPartition


class Pool(nn.Module):
    """torch.nn's pooling of windows that lie side by side (the stride is the kernel size) on a partitioned field.

    `[..., *local, channels]` -> `[..., *coarse local, channels]`, this rank's block of the grid `output`, which is the
    partition coarsened by `kernel_size`. No window lies across blocks, and nothing is communicated.
    Raises `ConfigurationError` where a rank owns no whole number of windows (see `GridPartition`, `multiple_of`), and
    for a grid of other axes.
    """

    axes: ClassVar[int]
    _function: ClassVar[Callable[..., torch.Tensor]]

    def __init__(self, partition: GridPartition, kernel_size: int | Sequence[int]) -> None:
        super().__init__()
        require_axes(type(self).__name__, partition, self.axes)
        self.partition = partition
        self.kernel_size = for_each_axis(kernel_size, self.axes)
        self.output = partition.coarsened(self.kernel_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool. Not collective."""
        require_block(type(self).__name__, x, self.partition)
        kernel = (1, *self.kernel_size) if self.axes == 1 else self.kernel_size
        return channels_last(self._function(channels_first(x, self.axes), kernel), x, self.axes)

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        return f"kernel_size={self.kernel_size}"


class AvgPool1d(Pool):
    __doc__ = Pool.__doc__
    axes, _function = 1, staticmethod(functional.avg_pool2d)


class AvgPool2d(Pool):
    __doc__ = Pool.__doc__
    axes, _function = 2, staticmethod(functional.avg_pool2d)


class AvgPool3d(Pool):
    __doc__ = Pool.__doc__
    axes, _function = 3, staticmethod(functional.avg_pool3d)


class MaxPool1d(Pool):
    __doc__ = Pool.__doc__
    axes, _function = 1, staticmethod(functional.max_pool2d)


class MaxPool2d(Pool):
    __doc__ = Pool.__doc__
    axes, _function = 2, staticmethod(functional.max_pool2d)


class MaxPool3d(Pool):
    __doc__ = Pool.__doc__
    axes, _function = 3, staticmethod(functional.max_pool3d)
