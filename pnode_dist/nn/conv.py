"""Convolution on a grid that is split over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from pnode_dist.exchange import halo
from pnode_dist.nn.field import channels_first, channels_last, for_each_axis, require_axes
from pnode_dist.partition.grid import GridPartition


class _Conv(nn.Module):
    """torch.nn's convolution with stride 1 and "same" size on a partitioned, channels-last field.

    `[..., *local, in_channels]` -> `[..., *local, out_channels]`. The halo is as wide as kernel and dilation need
    (`halo_width`, for each axis), and follows the partition's boundary rules where torch would pad. `weight` and `bias`
    have torch's names, shapes and initialisation, so a state_dict goes either way.
    `forward` is collective on the partition's communicator, and so is its backward.
    Raises `ValueError` for an even kernel size, and `ConfigurationError` for a grid of other axes.
    """

    _axes: ClassVar[int]
    _template: ClassVar[type[nn.Conv1d | nn.Conv2d | nn.Conv3d]]
    _function: ClassVar[Callable[..., torch.Tensor]]

    def __init__(
        self,
        partition: GridPartition,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        require_axes(type(self).__name__, partition, self._axes)
        kernel, steps = for_each_axis(kernel_size, self._axes), for_each_axis(dilation, self._axes)
        if any(size % 2 == 0 for size in kernel):
            raise ValueError(f"kernel_size = {kernel}: must be odd, so that the field keeps its size")
        template = self._template(
            in_channels,
            out_channels,
            kernel,  # type: ignore[arg-type]
            dilation=steps,  # type: ignore[arg-type]
            groups=groups,
            bias=bias,
            dtype=dtype,
        )
        self.partition = partition
        self.dilation = steps
        self.groups = groups
        self.halo_width = tuple(step * (size - 1) // 2 for step, size in zip(steps, kernel, strict=True))
        self.weight = template.weight
        self.bias = template.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve. Collective on the partition's communicator."""
        return self.convolve(halo(x, self.partition, self.halo_width))

    def convolve(self, padded: torch.Tensor) -> torch.Tensor:
        """Convolve a block with its halo. The result has no halo. Not collective."""
        weight, dilation = self.weight, self.dilation
        if self._axes == 1:
            weight, dilation = weight.unsqueeze(2), (1, *dilation)
        x = channels_first(padded, self._axes)
        out = self._function(x, weight, self.bias, dilation=dilation, groups=self.groups)
        return channels_last(out, padded, self._axes)

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        out_channels, in_group, *kernel = self.weight.shape
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return (
            f"{in_group * self.groups}, {out_channels}, kernel_size={tuple(kernel)}, dilation={self.dilation}{groups}"
        )


class Conv1d(_Conv):
    __doc__ = _Conv.__doc__
    _axes, _template, _function = 1, nn.Conv1d, staticmethod(functional.conv2d)


class Conv2d(_Conv):
    __doc__ = _Conv.__doc__
    _axes, _template, _function = 2, nn.Conv2d, staticmethod(functional.conv2d)


class Conv3d(_Conv):
    __doc__ = _Conv.__doc__
    _axes, _template, _function = 3, nn.Conv3d, staticmethod(functional.conv3d)
