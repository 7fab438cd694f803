"""The layer of a Fourier neural operator on a partitioned grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.fourier import irfft2, rfft2
from pnode_dist.nn.field import for_each_axis, require_axes, require_block
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.spectral import SpectralPartition


class SpectralConv2d(nn.Module):
    """The convolution of a real field by weights of its lowest Fourier modes, `[..., *local, channels]`.

    Z. Li et al.: Fourier neural operator for parametric partial differential equations, arXiv 2010.08895 (2020). Along
    y the layer keeps the modes from -modes[0] to modes[0] - 1, along x those from 0 to modes[1] - 1, and drops all
    others. `weight` is complex, `[2, in_channels, out_channels, *modes]`: the first half for modes of y that are not
    negative, the second one for the negative ones in ascending order. They are `weights1` and `weights2` of the
    authors' program. All ranks hold the whole weight and use their own modes: the sum of the ranks' gradients, which
    `pnode_dist.distributed.gradients.parallel` makes, is the gradient.

    The numbers of modes do not depend on the size of the grid. `dtype` is the type of the field, float32 or float64.
    `forward` is collective on the partition's communicator, and so is its backward. Raises `ConfigurationError` for
    more modes than the grid has.
    """

    def __init__(
        self,
        partition: GridPartition,
        in_channels: int,
        out_channels: int,
        modes: int | Sequence[int],
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_axes("SpectralConv2d", partition, 2)
        self.partition = partition
        self.spectrum = SpectralPartition(partition)
        self.modes = for_each_axis(modes, 2)
        most = partition.shape[0] // 2, self.spectrum.shape[1]
        if len(self.modes) != 2 or not all(1 <= kept <= n for kept, n in zip(self.modes, most, strict=True)):
            raise ConfigurationError(f"SpectralConv2d: modes = {self.modes}: must be from (1, 1) to {most}")
        field_type = dtype or torch.get_default_dtype()
        # As the authors do: real and imaginary parts are uniform in [0, scale).
        drawn = torch.rand(2, in_channels, out_channels, *self.modes, 2, dtype=field_type)
        self.weight = nn.Parameter(torch.view_as_complex(drawn / (in_channels * out_channels)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve. Collective on the partition's communicator."""
        require_block("SpectralConv2d", x, self.partition)
        spectral = rfft2(x, self.spectrum)
        start, stop = self.spectrum.owned[1]
        first = min(start, self.modes[1])
        columns = min(stop, self.modes[1]) - first
        rows = self.modes[0]
        upper = self._mixed(spectral[..., :rows, :columns, :], 0, first)
        lower = self._mixed(spectral[..., -rows:, :columns, :], 1, first)
        between = upper.new_zeros(*upper.shape[:-3], self.partition.shape[0] - 2 * rows, *upper.shape[-2:])
        kept = torch.cat([upper, between, lower], dim=-3)
        return irfft2(functional.pad(kept, (0, 0, 0, stop - start - columns)), self.spectrum)

    def _mixed(self, spectral: torch.Tensor, half: int, first: int) -> torch.Tensor:
        """Multiply the channels of each mode `[..., y, x, in_channels]` by its matrix."""
        weight = self.weight[half, :, :, :, first : first + spectral.shape[-2]]
        return torch.einsum("...yxi,ioyx->...yxo", spectral, weight)

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        _, in_channels, out_channels, *_ = self.weight.shape
        return f"{in_channels}, {out_channels}, modes={self.modes}"
