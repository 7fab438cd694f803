"""The layers of a Fourier neural operator on a partitioned grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.fourier import irfftn, rfftn
from pnode_dist.nn.field import for_each_axis, require_axes, require_block
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.spectral import SpectralPartition


class _SpectralConv(nn.Module):
    """The convolution of a real field by weights of its lowest Fourier modes, `[..., *local, channels]`.

    Z. Li et al.: Fourier neural operator for parametric partial differential equations, arXiv 2010.08895 (2020). The
    layer keeps the modes from 0 to modes[-1] - 1 along the last axis, those from -modes[k] to modes[k] - 1 along axis
    k before it, and drops all others. `weight` is complex, `[corners, in_channels, out_channels, *modes]`, with 1, 2 or
    4 corners for 1, 2 or 3 axes. Corner 0 has the modes that are negative along no axis, corner 1 those that are
    negative along the first axis, corner 2 along the second, and corner 3 along both; negative ones are in ascending
    order. They are `weights1` to `weights4` of the authors' program. All ranks hold the whole weight and use their own
    modes: the sum of the ranks' gradients, which `pnode_dist.distributed.gradients.parallel` makes, is the gradient.

    The numbers of modes do not depend on the size of the grid. `dtype` is the type of the field, float32 or float64.
    `forward` is collective on the partition's communicator, and so is its backward. Raises `ConfigurationError` for
    more modes than the grid has, and for a grid of other axes.
    """

    _axes: ClassVar[int]

    def __init__(
        self,
        partition: GridPartition,
        in_channels: int,
        out_channels: int,
        modes: int | Sequence[int],
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        require_axes(name, partition, self._axes)
        self.partition = partition
        self.spectrum = SpectralPartition(partition)
        self.modes = for_each_axis(modes, self._axes)
        most = (*(n // 2 for n in partition.shape[:-1]), self.spectrum.shape[-1])
        if len(self.modes) != self._axes or not all(1 <= kept <= n for kept, n in zip(self.modes, most, strict=True)):
            raise ConfigurationError(f"{name}: modes = {self.modes}: must be from {(1,) * self._axes} to {most}")
        corners = 2 ** (self._axes - 1)
        field_type = dtype or torch.get_default_dtype()
        # As the authors do: real and imaginary parts are uniform in [0, scale).
        drawn = torch.rand(corners, in_channels, out_channels, *self.modes, 2, dtype=field_type)
        self.weight = nn.Parameter(torch.view_as_complex(drawn / (in_channels * out_channels)))
        self._parts = [self._own_part(corner) for corner in range(corners)]

    def _own_part(self, corner: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return the part of a corner's modes that this rank owns: where they are in its block, and in the weight."""
        block, kept = [], []
        for axis, (modes, n, (start, stop)) in enumerate(
            zip(self.modes, self.spectrum.shape, self.spectrum.owned, strict=True)
        ):
            first = n - modes if corner >> axis & 1 else 0
            low = min(max(start, first), first + modes)
            high = max(low, min(stop, first + modes))
            block.append(slice(max(low - start, 0), max(high - start, 0)))
            kept.append(slice(low - first, high - first))
        return tuple(block), tuple(kept)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve. Collective on the partition's communicator."""
        require_block(type(self).__name__, x, self.partition)
        spectral = rfftn(x, self.spectrum)
        mixed = spectral.new_zeros(*spectral.shape[:-1], self.weight.shape[2])
        axes = "zyx"[-self._axes :]
        for weight, (block, kept) in zip(self.weight, self._parts, strict=True):
            place: tuple[Any, ...] = (..., *block, slice(None))
            mixed[place] = torch.einsum(f"...{axes}i,io{axes}->...{axes}o", spectral[place], weight[(..., *kept)])
        return irfftn(mixed, self.spectrum)

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        _, in_channels, out_channels, *_ = self.weight.shape
        return f"{in_channels}, {out_channels}, modes={self.modes}"


class SpectralConv1d(_SpectralConv):
    __doc__ = _SpectralConv.__doc__
    _axes = 1


class SpectralConv2d(_SpectralConv):
    __doc__ = _SpectralConv.__doc__
    _axes = 2


class SpectralConv3d(_SpectralConv):
    __doc__ = _SpectralConv.__doc__
    _axes = 3
