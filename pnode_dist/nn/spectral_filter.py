"""Filters of partitioned fields: real factors of their Fourier modes."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.fourier import fftn, ifftn, irfftn, rfftn
from pnode_dist.partition.spectral import SpectralPartition


class SpectralFilter(nn.Module):
    """Multiply the Fourier modes of a field `[..., *local, channels]` by real factors, the same for all channels.

    `factors` is this rank's part, `[*spectrum local, 1]`, float64. `exponential` and `dealiasing` make the usual ones.
    The field is real for a spectrum with `half=True`, else complex; its type is kept. The filter is linear and equal to
    its transpose. `forward` is collective on the spectrum's communicator, and so is its backward. As a map between the
    steps of a solve it is `between_steps=lambda t, u: smooth(u)`. Raises `ConfigurationError` for factors of another
    shape, and `TypeError` for a field of the other kind.
    """

    factors: torch.Tensor

    def __init__(self, spectrum: SpectralPartition, factors: torch.Tensor) -> None:
        super().__init__()
        wanted = (*spectrum.local_shape[:-1], 1)
        if tuple(factors.shape) != wanted or factors.is_complex():
            raise ConfigurationError(
                f"SpectralFilter: factors of {factors.dtype} and shape {tuple(factors.shape)}: must be real, "
                f"of shape {wanted}"
            )
        self.spectrum = spectrum
        self.register_buffer("factors", factors.to(torch.float64), persistent=False)

    @classmethod
    def exponential(cls, spectrum: SpectralPartition, order: float = 36, strength: float = 36.0) -> Self:
        """Return the filter exp(-strength (2 |m| / n)^order), see `SpectralPartition.exponential_filter`."""
        return cls(spectrum, spectrum.exponential_filter(order, strength))

    @classmethod
    def dealiasing(cls, spectrum: SpectralPartition, fraction: float = 2 / 3) -> Self:
        """Return the filter that drops the modes beyond a fraction of all, see `SpectralPartition.dealias`."""
        return cls(spectrum, spectrum.dealias(fraction))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Filter. Collective on the spectrum's communicator."""
        spectrum = self.spectrum
        if x.is_complex() == spectrum.half:
            kind, wanted = ("complex", False) if x.is_complex() else ("real", True)
            raise TypeError(
                f"SpectralFilter: a {kind} field for a spectrum with half = {spectrum.half}: must be {wanted}"
            )
        factors = self.factors.to(x.real.dtype)
        if spectrum.half:
            return irfftn(factors * rfftn(x, spectrum), spectrum)
        return ifftn(factors * fftn(x, spectrum), spectrum)

    def extra_repr(self) -> str:
        """Return the shape of the grid for `repr`."""
        return f"{self.spectrum.grid.shape}, half={self.spectrum.half}"
