"""Filters that bring fields of a fine grid to a coarse one, and the forcing of the scales that they remove.

The filters are the operators of A. Ross, Z. Li, P. Perezhogin, C. Fernandez-Granda, L. Zanna: Benchmarking of machine
learning ocean subgrid parameterizations in an idealized model, J. Adv. Model. Earth Syst. 15 (2023).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.fourier import irfft2
from pnode_dist.exchange.grid_halo import halo
from pnode_dist.exchange.redistribution import redistribute
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.spectral import SpectralPartition
from pnode_dist.problems.qg.config import EDDY, Operator, QGParameters
from pnode_dist.problems.qg.physics import QGTendency, filter_factors

_WIDTH = 2.0
_STEPS_PER_RATIO, _FEWEST_STEPS = 1.1, 3


class Coarsening(nn.Module):
    """Bring fields of the fine grid to the coarse one with the published `operator`. Both grids are periodic.

    - `sharp` (operator 1) removes the waves that the coarse grid cannot hold, and damps the others by the filter of
      the coarse model's steps.
    - `gaussian` (operator 2) removes the same waves, and damps the others by exp(-kappa^2 w^2 / 24), with the radial
      wave number kappa and a width w of two coarse cells.
    - `diffusion` (operator 3) smooths on the fine grid, about as a Gaussian with a width of one coarse cell does, and
      takes the mean over the fine points of each coarse cell. Short waves are damped, and not removed. The values are
      those of the centres of cells.

    Both partitions divide the same domain over the same ranks. No rank holds a whole field. Raises
    `ConfigurationError` unless the coarse grid has an even number of points along both axes, in the proportion of the
    fine one, and fewer; with `diffusion` also unless their ratio is whole.
    """

    def __init__(
        self,
        fine: GridPartition,
        coarse: GridPartition,
        operator: Operator = "sharp",
        parameters: QGParameters = EDDY,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        (ny, nx), (wide_ny, wide_nx) = coarse.shape, fine.shape
        if ny % 2 or nx % 2 or ny >= wide_ny or ny * wide_nx != nx * wide_ny:
            raise ConfigurationError(
                f"coarsening: shape = {coarse.shape}: must be even, and have fewer points than {fine.shape} in "
                "its proportion"
            )
        self.fine, self.coarse = fine, coarse
        self.filter = (
            _Diffusion(fine, coarse)
            if operator == "diffusion"
            else _SpectralFilter(fine, coarse, operator, parameters, dtype)
        )

    def forward(self, field: torch.Tensor) -> torch.Tensor:
        """Return the real field `[..., ny_local, nx_local, channels]` of the coarse grid. Collective.

        `field` is this rank's block of the fine grid, with any number of channels. Differentiable.
        """
        coarse: torch.Tensor = self.filter(field)
        return coarse


class _SpectralFilter(nn.Module):
    """Operators 1 and 2: cut the spectrum, and multiply it by factors.

    Rows are transformed first and cut at once, so that messages have the size of the coarse spectrum along x.
    """

    factors: torch.Tensor

    def __init__(
        self,
        fine: GridPartition,
        coarse: GridPartition,
        operator: Operator,
        parameters: QGParameters,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.fine, self._kept = fine, coarse.shape[0] // 2
        self.spectrum = SpectralPartition(coarse)
        self._slabs = SpectralPartition(fine).stages[0].before
        columns = self.spectrum.shape[1]
        rows, parts = (_lengths(ranges) for ranges in (self._slabs.ranges[0], self.spectrum.blocks.ranges[1]))
        shape = (fine.shape[0], columns)
        self._rows = GridPartition(fine.comm, shape, 2, stencil_width=0, ownership=[rows, [columns]])
        self._columns = GridPartition(fine.comm, shape, 2, stencil_width=0, ownership=[[shape[0]], parts])
        if operator == "sharp":
            factors = filter_factors(self.spectrum, parameters.filterfac)
        else:
            ky, kx = self.spectrum.wavenumbers([float(points) for points in coarse.shape])
            factors = torch.exp(-(kx**2 + ky**2) * _WIDTH**2 / 24)
        ratio = math.prod(fine.shape) / math.prod(coarse.shape)
        self.register_buffer("factors", (factors / ratio).to(dtype), persistent=False)

    def forward(self, field: torch.Tensor) -> torch.Tensor:
        """Return the coarse field. Collective."""
        columns, kept = self.spectrum.shape[1], self._kept
        lines = torch.fft.rfft(redistribute(field, self.fine, self._slabs), dim=-2).narrow(-2, 0, columns)
        spectral = torch.fft.fft(redistribute(lines, self._rows, self._columns), dim=-3)
        low = torch.cat([spectral.narrow(-3, 0, kept), spectral.narrow(-3, spectral.shape[-3] - kept, kept)], dim=-3)
        return irfft2(self.factors * low, self.spectrum)


class _Diffusion(nn.Module):
    """Operator 3: a polynomial of the Laplacian on the fine grid, then the mean over each coarse cell.

    The cells of a rank are whole: fine points are redistributed first where a cell crosses a border. The degree of the
    polynomial grows with the ratio of the grids, and each degree takes one halo of a single point.
    """

    def __init__(self, fine: GridPartition, coarse: GridPartition) -> None:
        super().__init__()
        if fine.shape[0] % coarse.shape[0]:
            raise ConfigurationError(f"coarsening: shape = {coarse.shape}: with diffusion must divide {fine.shape}")
        self.fine, self.ratio = fine, fine.shape[0] // coarse.shape[0]
        ownership = [[self.ratio * length for length in _lengths(ranges)] for ranges in coarse.ranges]
        self._cells = GridPartition(fine.comm, fine.shape, 2, "periodic", ownership=ownership)
        self._coefficients = gaussian_coefficients(self.ratio)

    def forward(self, field: torch.Tensor) -> torch.Tensor:
        """Return the coarse field. Collective."""
        before = redistribute(field, self.fine, self._cells)
        now = self._scaled_laplacian(before)
        zeroth, first, *others = self._coefficients
        smooth = zeroth * before + first * now
        for coefficient in others:
            before, now = now, 2 * self._scaled_laplacian(now) - before
            smooth = smooth + coefficient * now
        *leading, ny, nx, channels = smooth.shape
        cells = smooth.reshape(*leading, ny // self.ratio, self.ratio, nx // self.ratio, self.ratio, channels)
        return cells.mean(dim=(-4, -2))

    def _scaled_laplacian(self, field: torch.Tensor) -> torch.Tensor:
        """Return -(1 + laplacian / 4) of a field, in units of the cell: its eigenvalues are in [-1, 1]."""
        wide = halo(field, self._cells, 1)
        above, below = wide[..., 2:, 1:-1, :], wide[..., :-2, 1:-1, :]
        right, left = wide[..., 1:-1, 2:, :], wide[..., 1:-1, :-2, :]
        return (above + below + right + left) / -4


def gaussian_coefficients(width: float) -> list[float]:
    """Return the coefficients in Chebyshev's polynomials of the Gaussian filter of GCM-Filters, for squares of size 1.

    They are those of version 0.5.1 (N. Loose et al., J. Open Source Softw. 7, 3947 (2022)) with its number of steps,
    which is their degree. The argument -1 is a constant field, and 1 the shortest wave of the five-point Laplacian.
    Among the polynomials that have the values of exp(-kappa^2 width^2 / 24) there, this one has the smallest squares of
    errors at the Gauss points: I. Grooms et al., J. Adv. Model. Earth Syst. 13 (2021).
    """
    degree = max(math.ceil(_STEPS_PER_RATIO * width), _FEWEST_STEPS)
    points, _ = chebyshev.chebgauss(degree + 1)
    # At 1 the five-point Laplacian has the eigenvalue -8.
    wanted = np.exp(-4 * (points + 1) * width**2 / 24)
    last = math.exp(-8 * width**2 / 24)
    line = np.zeros(degree + 1)
    line[:2] = (1 + last) / 2, (last - 1) / 2
    # Differences T_n - T_(n + 2) vanish at both ends.
    vanishing = np.eye(degree + 1, degree - 1) - np.eye(degree + 1, degree - 1, k=-2)
    values = chebyshev.chebvander(points, degree)
    weights, *_ = np.linalg.lstsq(values @ vanishing, wanted - values @ line)
    return [float(value) for value in line + vanishing @ weights]


def _lengths(ranges: list[tuple[int, int]]) -> list[int]:
    """Return the numbers of points of owned ranges."""
    return [stop - start for start, stop in ranges]


def refined(coarsening: Coarsening, field: torch.Tensor) -> torch.Tensor:
    """Return a coarse field on the fine grid, damped as by the filter. Collective. No gradient.

    It is the transpose of `coarsening`, times the ratio of the numbers of points: with `sharp` and `gaussian` the sum
    of the coarse field's waves, and with `diffusion` the field that is constant in each cell, smoothed.
    """
    fine, coarse = coarsening.fine, coarsening.coarse
    with torch.enable_grad():
        zero = torch.zeros(fine.local_shape, dtype=field.dtype, requires_grad=True)
        (transposed,) = torch.autograd.grad(coarsening(zero), zero, field)
    return transposed * (math.prod(fine.shape) / math.prod(coarse.shape))


def subgrid_forcing(
    coarsening: Coarsening, fine: QGTendency, coarse: QGTendency, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the coarse q in 1/s, and the forcing in 1/s^2 that its tendency lacks, both on the coarse grid.

    The forcing is filtered(dq/dt) - dq/dt(filtered(q)), with the tendencies of the two grids. `q` is on the fine one.
    Collective on the partition's communicator.
    """
    now = torch.zeros((), dtype=q.dtype)
    low, tendency = coarsening(torch.cat([q, fine(now, q)], dim=-1)).chunk(2, dim=-1)
    return low.contiguous(), tendency - coarse(now, low.contiguous())
