"""Convolution on a grid that is split over ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from pnode_dist.exchange import halo
from pnode_dist.partition.grid import GridPartition


class Conv2d(nn.Module):
    """torch.nn.Conv2d with stride 1 and "same" size on a partitioned, channels-last field.

    `[..., ny_local, nx_local, in_channels]` -> `[..., ny_local, nx_local, out_channels]`. The halo is as wide as
    kernel and dilation need, and follows the partition's boundary rules where torch would pad. `weight` and `bias`
    have torch.nn.Conv2d's names, shapes and initialisation, so a state_dict goes either way.
    `forward` is collective on the partition's communicator, and so is its backward.
    Raises `ValueError` for an even kernel size.
    """

    def __init__(
        self,
        partition: GridPartition,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        template = nn.Conv2d(
            in_channels, out_channels, kernel_size, dilation=dilation, groups=groups, bias=bias, dtype=dtype
        )
        ky, kx = (int(k) for k in template.kernel_size)
        dy, dx = (int(d) for d in template.dilation)
        if ky % 2 == 0 or kx % 2 == 0:
            raise ValueError(f"kernel_size = {(ky, kx)}: must be odd, so that the field keeps its size")
        self.partition = partition
        self.dilation = (dy, dx)
        self.groups = groups
        self.halo_width = (dy * (ky - 1) // 2, dx * (kx - 1) // 2)
        self.weight = template.weight
        self.bias = template.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve. Collective on the partition's communicator."""
        leading = x.shape[:-3]
        padded = halo(x.reshape(-1, *x.shape[-3:]), self.partition, self.halo_width)
        # Moving the channel axis only relabels the strides: the memory is torch's channels_last format already.
        out = functional.conv2d(
            padded.permute(0, 3, 1, 2), self.weight, self.bias, dilation=self.dilation, groups=self.groups
        )
        return out.permute(0, 2, 3, 1).reshape(*leading, *x.shape[-3:-1], self.weight.shape[0])

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        out_channels, in_group, ky, kx = self.weight.shape
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"{in_group * self.groups}, {out_channels}, kernel_size=({ky}, {kx}), dilation={self.dilation}{groups}"
