"""Discrete Fourier transforms of a partitioned field, with the names and the results of torch.fft.

A transform is a sequence of stages: torch's own transform along the axes of which a rank has whole lines, and a
redistribution to the blocks of the next stage. The inverse goes through the stages backwards. On a grid of one axis the
lines of all fields and channels are divided over the ranks. So all derivatives are torch's and the transpose of a
redistribution, and the sums over conjugate pairs in the derivatives of real transforms are right without further
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.redistribution import from_lines, redistribute, to_lines
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
    """Return `fftn` on a grid of two axes. Collective. Raises `ConfigurationError` for a grid of other axes."""
    _require("fft2", spectrum, half=False, axes=2)
    return _transformed("fft2", x, spectrum, norm)


def ifft2(spectral: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return `ifftn` on a grid of two axes. Collective. Raises `ConfigurationError` for a grid of other axes."""
    _require("ifft2", spectrum, half=False, axes=2)
    return _restored("ifft2", spectral, spectrum, norm)


def rfft2(x: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return `rfftn` on a grid of two axes. Collective. Raises `ConfigurationError` for a grid of other axes."""
    _require("rfft2", spectrum, half=True, axes=2)
    return _transformed("rfft2", x, spectrum, norm)


def irfft2(spectral: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return `irfftn` on a grid of two axes. Collective. Raises `ConfigurationError` for a grid of other axes."""
    _require("irfft2", spectrum, half=True, axes=2)
    return _restored("irfft2", spectral, spectrum, norm)


def fft(x: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return `fftn` on a grid of one axis. Collective. Raises `ConfigurationError` for a grid of other axes.

    Each field of the batch and each channel has one line. The ranks transform whole lines, an even share of all. So a
    rank holds `lines / ranks` lines of n points, and with fewer lines than ranks some ranks only wait: a transform of
    one line takes as long as on one rank. Two ranks exchange at most two messages in each direction.
    """
    _require("fft", spectrum, half=False, axes=1)
    return _transformed("fft", x, spectrum, norm)


def ifft(spectral: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return `ifftn` on a grid of one axis. Collective. Raises `ConfigurationError` for a grid of other axes."""
    _require("ifft", spectrum, half=False, axes=1)
    return _restored("ifft", spectral, spectrum, norm)


def rfft(x: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return `rfftn` on a grid of one axis. Collective. Raises `ConfigurationError` for a grid of other axes.

    The ranks transform whole lines, an even share of all, as in `fft`.
    """
    _require("rfft", spectrum, half=True, axes=1)
    return _transformed("rfft", x, spectrum, norm)


def irfft(spectral: torch.Tensor, spectrum: SpectralPartition, norm: Norm = "backward") -> torch.Tensor:
    """Return `irfftn` on a grid of one axis. Collective. Raises `ConfigurationError` for a grid of other axes."""
    _require("irfft", spectrum, half=True, axes=1)
    return _restored("irfft", spectral, spectrum, norm)


def _require(name: str, spectrum: SpectralPartition, half: bool, axes: int | None = None) -> None:
    if spectrum.half != half:
        raise ConfigurationError(f"{name}: spectrum has half = {spectrum.half}: must be {half}")
    if axes is not None and len(spectrum.shape) != axes:
        raise ConfigurationError(
            f"{name}: spectrum of shape {spectrum.shape}: must have {axes} {'axis' if axes == 1 else 'axes'}"
        )


def _check(name: str, shape: tuple[int, ...], partition: GridPartition) -> None:
    own = partition.local_shape[:-1]
    if len(shape) <= len(own) or shape[-1 - len(own) : -1] != own:
        raise ValueError(f"{name}: got shape {shape}, this rank owns [..., {', '.join(map(str, own))}, channels]")


def _transformed(name: str, x: torch.Tensor, spectrum: SpectralPartition, norm: Norm) -> torch.Tensor:
    _check(name, tuple(x.shape), spectrum.grid)
    axes = len(spectrum.shape)
    if not spectrum.stages:
        lines = _forward(to_lines(x, spectrum.grid), [-1], spectrum.half, norm)
        return from_lines(lines, spectrum.blocks, _numbering(x))
    blocks = spectrum.grid
    for stage in spectrum.stages:
        field = redistribute(x, blocks, stage.before)
        x, blocks = _forward(field, _from_end(stage.axes, axes), stage.half, norm), stage.after
    return x


def _restored(name: str, spectral: torch.Tensor, spectrum: SpectralPartition, norm: Norm) -> torch.Tensor:
    _check(name, tuple(spectral.shape), spectrum.blocks)
    axes, shape = len(spectrum.shape), spectrum.grid.shape
    if not spectrum.stages:
        lines = _inverse(to_lines(spectral, spectrum.blocks), [-1], spectrum.half, norm, shape)
        return from_lines(lines, spectrum.grid, _numbering(spectral))
    x, blocks = spectral, spectrum.blocks
    for stage in reversed(spectrum.stages):
        modes = redistribute(x, blocks, stage.after)
        sizes = [shape[axis] for axis in stage.axes]
        x, blocks = _inverse(modes, _from_end(stage.axes, axes), stage.half, norm, sizes), stage.before
    return redistribute(x, blocks, spectrum.grid)


def _numbering(x: torch.Tensor) -> tuple[int, ...]:
    """Return the shape `[..., channels]` of the lines of a field of one axis."""
    return (*x.shape[:-2], x.shape[-1])


def _from_end(axes: Sequence[int], number: int) -> list[int]:
    """Return axes of a grid of `number` axes, counted from the end of `[..., *local, channels]`."""
    return [axis - number - 1 for axis in axes]


def _forward(x: torch.Tensor, dim: list[int], half: bool, norm: Norm) -> torch.Tensor:
    transform = torch.fft.rfftn if half else torch.fft.fftn
    return _of_any_number(partial(transform, dim=dim, norm=norm), x, dim[0])


def _inverse(x: torch.Tensor, dim: list[int], half: bool, norm: Norm, sizes: Sequence[int]) -> torch.Tensor:
    transform = torch.fft.irfftn if half else torch.fft.ifftn
    return _of_any_number(partial(transform, s=sizes, dim=dim, norm=norm), x, dim[0])


def _of_any_number(transform: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, first: int) -> torch.Tensor:
    """Return the transform of all fields, of which the axes from `first` on are the last ones. There may be none.

    MKL refuses a transform of no field. A rank without lines, or a replica without a sample, transforms one of zeros
    and drops it, so that its derivatives take part in the exchanges.
    """
    if x.numel() > 0:
        return transform(x)
    leading, block = x.shape[:first], x.shape[first:]
    one = torch.cat([x.reshape(0, *block), x.new_zeros(1, *block)])
    none = transform(one)[:0]
    return none.reshape(*leading, *none.shape[1:])
