"""Filters that bring fields of a fine grid to a coarse one, and the forcing of the scales that they remove.

The filters are operators 1 and 2 of A. Ross, Z. Li, P. Perezhogin, C. Fernandez-Granda, L. Zanna: Benchmarking of
machine learning ocean subgrid parameterizations in an idealized model, J. Adv. Model. Earth Syst. 15 (2023).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.fourier import irfft2
from pnode_dist.exchange.redistribution import redistribute
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.spectral import SpectralPartition
from pnode_dist.problems.qg.config import EDDY, Operator, QGParameters
from pnode_dist.problems.qg.physics import QGTendency, filter_factors

_WIDTH = 2.0


class Coarsening(nn.Module):
    """Remove the waves that the coarse grid cannot hold, and damp the others, with the published `operator`.

    `sharp` (operator 1) damps by the filter of the coarse model's steps. `gaussian` (operator 2) damps by
    exp(-kappa^2 w^2 / 24), with the radial wave number kappa and a width w of two cells.

    Both partitions divide the same domain over the same ranks. Rows are transformed first and cut at once, so that
    messages have the size of the coarse spectrum along x. No rank holds a whole field. Raises `ConfigurationError`
    unless the coarse grid has an even number of points along both axes, in the proportion of the fine one, and fewer.
    """

    factors: torch.Tensor

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
        self.spectrum = SpectralPartition(coarse)
        self._slabs = SpectralPartition(fine).stages[0].before
        columns = self.spectrum.shape[1]
        rows, parts = (
            [stop - start for start, stop in ranges]
            for ranges in (self._slabs.ranges[0], self.spectrum.blocks.ranges[1])
        )
        shape = (wide_ny, columns)
        self._rows = GridPartition(fine.comm, shape, 2, stencil_width=0, ownership=[rows, [columns]])
        self._columns = GridPartition(fine.comm, shape, 2, stencil_width=0, ownership=[[wide_ny], parts])
        if operator == "sharp":
            factors = filter_factors(self.spectrum, parameters.filterfac)
        else:
            ky, kx = self.spectrum.wavenumbers([float(points) for points in coarse.shape])
            factors = torch.exp(-(kx**2 + ky**2) * _WIDTH**2 / 24)
        ratio = wide_ny * wide_nx / (ny * nx)
        self.register_buffer("factors", (factors / ratio).to(dtype), persistent=False)

    def forward(self, field: torch.Tensor) -> torch.Tensor:
        """Return the real field `[..., ny_local, nx_local, channels]` of the coarse grid. Collective.

        `field` is this rank's block of the fine grid, with any number of channels. Differentiable.
        """
        columns, half = self.spectrum.shape[1], self.coarse.shape[0] // 2
        lines = torch.fft.rfft(redistribute(field, self.fine, self._slabs), dim=-2).narrow(-2, 0, columns)
        spectral = torch.fft.fft(redistribute(lines, self._rows, self._columns), dim=-3)
        low = torch.cat([spectral.narrow(-3, 0, half), spectral.narrow(-3, spectral.shape[-3] - half, half)], dim=-3)
        return irfft2(self.factors * low, self.spectrum)


def refined(coarsening: Coarsening, field: torch.Tensor) -> torch.Tensor:
    """Return the field on the fine grid that has the waves of a coarse one, damped as by the filter. Collective.

    It is the transpose of `coarsening`, times the ratio of the numbers of points. No gradient.
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
