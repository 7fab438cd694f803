"""Discrete Fourier transforms of a partitioned field, with the names and the results of torch.fft.

A transform is torch's own along the axes of which a rank has whole lines, a redistribution, and torch's own along the
first axis. So all derivatives are torch's and the transpose of a redistribution, and the sums over conjugate pairs in
the derivatives of real transforms are right without further weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.redistribution import redistribute
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.spectral import SpectralPartition

Norm = Literal["backward", "ortho", "forward"]


def fftn(x: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return the spectrum of a real or complex field over all axes of the grid. Collective on the spectrum's comm.

    `x` is `[..., *grid local, channels]`, with any number of channels, in single or double precision. Returns
    `[..., *spectrum local, channels]`, complex. `norm` is that of torch.fft. Differentiable in reverse and in forward
    mode, which are collective too. Raises `ConfigurationError` for a spectrum with `half=True`, and `ValueError` for
    another block.
    """
    _require("fftn", spectrum, half=False)
    return _transformed("fftn", x, spectrum, norm)


def ifftn(spectral: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return the complex field with this spectrum, `[..., *grid local, channels]`. Inverse of `fftn`. Collective."""
    _require("ifftn", spectrum, half=False)
    return _restored("ifftn", spectral, spectrum, norm)


def rfftn(x: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return half of the spectrum of a real field over all axes of the grid. Collective on the spectrum's comm.

    As `fftn`, with n // 2 + 1 wave numbers along the last axis. Raises `ConfigurationError` for a spectrum with
    `half=False`, and `ValueError` for another block.
    """
    _require("rfftn", spectrum, half=True)
    return _transformed("rfftn", x, spectrum, norm)


def irfftn(spectral: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return the real field with this half spectrum, `[..., *grid local, channels]`. Inverse of `rfftn`. Collective.

    The size of the last axis is the grid's, even or odd.
    """
    _require("irfftn", spectrum, half=True)
    return _restored("irfftn", spectral, spectrum, norm)


def fft2(x: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return `fftn` on a grid of two axes. Collective. Raises `ConfigurationError` for a grid of three axes."""
    _require("fft2", spectrum, half=False, axes=2)
    return _transformed("fft2", x, spectrum, norm)


def ifft2(spectral: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return `ifftn` on a grid of two axes. Collective. Raises `ConfigurationError` for a grid of three axes."""
    _require("ifft2", spectrum, half=False, axes=2)
    return _restored("ifft2", spectral, spectrum, norm)


def rfft2(x: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return `rfftn` on a grid of two axes. Collective. Raises `ConfigurationError` for a grid of three axes."""
    _require("rfft2", spectrum, half=True, axes=2)
    return _transformed("rfft2", x, spectrum, norm)


def irfft2(spectral: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return `irfftn` on a grid of two axes. Collective. Raises `ConfigurationError` for a grid of three axes."""
    _require("irfft2", spectrum, half=True, axes=2)
    return _restored("irfft2", spectral, spectrum, norm)


def _require(name: str, spectrum: SpectralPartition, half: bool, axes: int | None = None) -> None:
    if spectrum.half != half:
        raise ConfigurationError(f"{name}: spectrum has half = {spectrum.half}: must be {half}")
    if axes is not None and len(spectrum.shape) != axes:
        raise ConfigurationError(f"{name}: spectrum of shape {spectrum.shape}: must have {axes} axes")


def _check(name: str, shape: tuple[int, ...], partition: GridPartition) -> None:
    own = partition.local_shape[:-1]
    if len(shape) <= len(own) or shape[-1 - len(own) : -1] != own:
        raise ValueError(f"{name}: got shape {shape}, this rank owns [..., {', '.join(map(str, own))}, channels]")


def _inner_axes(spectrum: SpectralPartition) -> list[int]:
    """Return the axes of which a slab has whole lines, counted from the end."""
    return list(range(-len(spectrum.shape), -1))


def _all_axes(spectrum: SpectralPartition) -> list[int]:
    return [-1 - len(spectrum.shape), *_inner_axes(spectrum)]


def _transformed(name: str, x: torch.Tensor, spectrum: SpectralPartition, norm: Norm) -> torch.Tensor:
    _check(name, tuple(x.shape), spectrum.grid)
    if _is_empty(x):
        return _of_no_field(lambda one: _transformed(name, one, spectrum, norm), x, spectrum)
    if spectrum.comm.size == 1:
        # One call of torch has the same bits, and takes less time than two.
        whole: torch.Tensor = (torch.fft.rfftn if spectrum.half else torch.fft.fftn)(
            x, dim=_all_axes(spectrum), norm=norm
        )
        return whole
    field = redistribute(x, spectrum.grid, spectrum.slabs)
    inner = _inner_axes(spectrum)
    if spectrum.half:
        lines = torch.fft.rfftn(field, dim=inner, norm=norm)
    else:
        lines = torch.fft.fftn(field, dim=inner, norm=norm)
    blocks = redistribute(lines, spectrum.slab_spectrum, spectrum.blocks)
    spectral: torch.Tensor = torch.fft.fft(blocks, dim=-1 - len(spectrum.shape), norm=norm)
    return spectral


def _restored(name: str, spectral: torch.Tensor, spectrum: SpectralPartition, norm: Norm) -> torch.Tensor:
    _check(name, tuple(spectral.shape), spectrum.blocks)
    if _is_empty(spectral):
        return _of_no_field(lambda one: _restored(name, one, spectrum, norm), spectral, spectrum)
    if spectrum.comm.size == 1:
        inverse = torch.fft.irfftn if spectrum.half else torch.fft.ifftn
        whole: torch.Tensor = inverse(spectral, s=spectrum.grid.shape, dim=_all_axes(spectrum), norm=norm)
        return whole
    blocks = torch.fft.ifft(spectral, dim=-1 - len(spectrum.shape), norm=norm)
    lines = redistribute(blocks, spectrum.blocks, spectrum.slab_spectrum)
    inner = _inner_axes(spectrum)
    if spectrum.half:
        field = torch.fft.irfftn(lines, s=spectrum.grid.shape[1:], dim=inner, norm=norm)
    else:
        field = torch.fft.ifftn(lines, dim=inner, norm=norm)
    return redistribute(field, spectrum.slabs, spectrum.grid)


def _is_empty(x: torch.Tensor) -> bool:
    """Return True for a batch without a field, as replicas without a sample have."""
    return x.numel() == 0 and x.shape[-1] > 0


def _of_no_field(
    transform: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, spectrum: SpectralPartition
) -> torch.Tensor:
    """Return the transform of an empty batch, which MKL refuses, as a part of that of one field. Collective."""
    axes = len(spectrum.shape) + 1
    leading, block = x.shape[:-axes], x.shape[-axes:]
    one = torch.cat([x.reshape(0, *block), x.new_zeros(1, *block)])
    none = transform(one)[:0]
    return none.reshape(*leading, *none.shape[1:])
