"""Published closures without learnt parameters, to compare a learnt one with.

Their numbers are those of pyqg (https://pyqg.readthedocs.io). They are called as closures are: with q in 1/s, u and v
in m/s, each `[..., ny_local, nx_local, 2]`, for the forcing of dq/dt in 1/s2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import global_sum, irfft2, rfft2
from pnode_dist.nn.norm import points
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.qg.config import EDDY, QGParameters
from pnode_dist.problems.qg.physics import QGTendency, lengths

_SMALLEST = 1e-32


class _Derivatives(nn.Module):
    """Spectral derivatives on the grid of the equations, with the shear and the eddy viscosity that they give."""

    along_x: torch.Tensor
    along_y: torch.Tensor
    laplacian: torch.Tensor

    def __init__(self, partition: GridPartition, parameters: QGParameters, constant: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.equations = QGTendency(partition, parameters, dtype=dtype)
        self.spectrum = self.equations.spectrum
        self.spacing = parameters.L / partition.shape[1]
        self.constant = constant
        ky, kx = self.spectrum.wavenumbers(lengths(partition, parameters))
        rows, columns = self.spectrum.modes
        ny, nx = partition.shape
        # The first derivative of the shortest wave has no real part on the grid.
        shortest_x = (2 * columns == nx).view(1, -1, 1)
        single = shortest_x | (columns == 0).view(1, -1, 1)
        shortest_y = (2 * rows.abs() == ny).view(-1, 1, 1)
        coefficients = {
            "along_x": torch.where(shortest_x, 0.0, kx),
            "along_y": torch.where(shortest_y & single, 0.0, ky),
            "laplacian": -(kx**2 + ky**2),
        }
        for name, value in coefficients.items():
            self.register_buffer(name, value.to(dtype), persistent=False)

    def _shear(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the spectrum of Sxx, Syy and Sxy of both layers, `[..., 6]`, of the spectra of u and v."""
        stretching = 1j * self.along_x * u, 1j * self.along_y * v
        return torch.cat([*stretching, 0.5j * (self.along_y * u + self.along_x * v)], dim=-1)

    def _viscosity(self, shear: torch.Tensor) -> torch.Tensor:
        """Return (C dx)^2 sqrt(2 (Sxx^2 + Syy^2 + 2 Sxy^2)) in m2/s `[..., 2]`, of the shear `[..., 6]` in 1/s."""
        sxx, syy, sxy = shear.chunk(3, dim=-1)
        # The norm has a derivative of zero at rest, where the square root has none.
        rate = torch.linalg.vector_norm(torch.stack([sxx, syy, 2**0.5 * sxy]), dim=0)
        viscosity: torch.Tensor = (self.constant * self.spacing) ** 2 * 2**0.5 * rate
        return viscosity


class Smagorinsky(_Derivatives):
    """The eddy viscosity of J. Smagorinsky, Mon. Weather Rev. 91, 99 (1963), as a forcing of potential vorticity.

    nu = (C dx)^2 sqrt(2 (Sxx^2 + Syy^2 + 2 Sxy^2)) with the shear Sij = (di uj + dj ui) / 2 and the distance dx of
    points. The forcing of velocity component i is 2 dj (nu Sij), and that of dq/dt its curl. `constant` is C, by
    default 0.1. Potential vorticity and momentum are conserved. An evaluation has four transforms. Collective on the
    partition's communicator. Raises `ConfigurationError` for a constant below 0.
    """

    def __init__(
        self,
        partition: GridPartition,
        parameters: QGParameters = EDDY,
        constant: float = 0.1,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(partition, parameters, _not_negative("constant", constant), dtype)

    def forward(self, q: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the forcing of dq/dt in 1/s2 in the shape of `q`, which is unused. Collective."""
        velocities = rfft2(torch.cat([u, v], dim=-1), self.spectrum).chunk(2, dim=-1)
        shear = irfft2(self._shear(*velocities), self.spectrum)
        stress = torch.cat([self._viscosity(shear)] * 3, dim=-1) * shear
        xx, yy, xy = rfft2(stress, self.spectrum).chunk(3, dim=-1)
        # The curl of the divergence, d2 (yy - xx) / dxdy + (d2/dx2 - d2/dy2) xy, twice.
        mixed = self.along_x * self.along_y * (xx - yy)
        return irfft2(2 * (mixed + (self.along_y**2 - self.along_x**2) * xy), self.spectrum)


class Backscatter(_Derivatives):
    """Biharmonic Smagorinsky dissipation that returns its energy to the large scales by a negative viscosity.

    M. F. Jansen and I. M. Held: Parameterizing subgrid-scale eddy effects using energetically consistent backscatter,
    Ocean Model. 80, 36 (2014), in the form for two layers that pyqg calls BackscatterBiharmonic. With the viscosity nu
    of `Smagorinsky` the dissipation is D = -lap(nu dx^2 lap2 psi), and the forcing D - `returned` lap2 psi <psi D> /
    <psi lap2 psi>, where <> is the mean over the domain and, by thickness, the layers. `constant` (0.08) and `returned`
    (0.99) are the published values. An evaluation has four transforms and a sum over the ranks. Collective on the
    partition's communicator. Raises `ConfigurationError` for a constant or a share below 0.
    """

    thickness: torch.Tensor

    def __init__(
        self,
        partition: GridPartition,
        parameters: QGParameters = EDDY,
        constant: float = 0.08,
        returned: float = 0.99,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(partition, parameters, _not_negative("constant", constant), dtype)
        self.returned = _not_negative("returned", returned)
        # Only the ratio counts.
        thickness = torch.tensor([1.0, 1 / parameters.delta], dtype=dtype) / points(partition)
        self.register_buffer("thickness", thickness, persistent=False)

    def forward(self, q: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the forcing of dq/dt in 1/s2 in the shape of `q`. Collective."""
        spectra = rfft2(torch.cat([q, u, v], dim=-1), self.spectrum).chunk(3, dim=-1)
        psi = self.equations.own * spectra[0] + self.equations.other * spectra[0].flip(-1)
        wanted = torch.cat([psi, self.laplacian**2 * psi, self._shear(*spectra[1:])], dim=-1)
        fields = irfft2(wanted, self.spectrum)
        psi, biharmonic, shear = fields[..., :2], fields[..., 2:4], fields[..., 4:]
        flux = rfft2(self._viscosity(shear) * self.spacing**2 * biharmonic, self.spectrum)
        dissipation = -irfft2(self.laplacian * flux, self.spectrum)
        pair = torch.stack([psi * dissipation, psi * biharmonic]) * self.thickness
        lost, gained = global_sum(pair.sum((-3, -2, -1)), self.spectrum.comm)
        ratio = self.returned * lost / (gained + _SMALLEST)
        forcing: torch.Tensor = dissipation - ratio[..., None, None, None] * biharmonic
        return forcing


class ZannaBolton(_Derivatives):
    """The stress of L. Zanna and T. Bolton, Geophys. Res. Lett. 47, e2020GL088376 (2020), found by regression.

    With the vorticity z, the stretching ux - vy and the shearing vx + uy the forcing of dq/dt is kappa
    (2 d2/dxdy (z shearing) + (d2/dx2 - d2/dy2)(z stretching)). `constant` is kappa in m2. Its default was fitted by the
    authors of pyqg to the sub-grid forcing of the published configuration on 64 x 64 points. Potential vorticity and
    momentum are conserved. An evaluation has four transforms. Collective on the partition's communicator. Raises
    `ConfigurationError` for a constant that is not finite.
    """

    def __init__(
        self,
        partition: GridPartition,
        parameters: QGParameters = EDDY,
        constant: float = -46_761_284.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not math.isfinite(constant):
            raise ConfigurationError(f"closure: constant = {constant}: must be finite")
        super().__init__(partition, parameters, constant, dtype)

    def forward(self, q: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the forcing of dq/dt in 1/s2 in the shape of `q`, which is unused. Collective."""
        u, v = rfft2(torch.cat([u, v], dim=-1), self.spectrum).chunk(2, dim=-1)
        vorticity = 1j * (self.along_x * v - self.along_y * u)
        shearing = 1j * (self.along_x * v + self.along_y * u)
        stretching = 1j * (self.along_x * u - self.along_y * v)
        fields = irfft2(torch.cat([vorticity, shearing, stretching], dim=-1), self.spectrum)
        products = torch.cat([fields[..., :2]] * 2, dim=-1) * fields[..., 2:]
        sheared, stretched = rfft2(products, self.spectrum).chunk(2, dim=-1)
        curl = (self.along_y**2 - self.along_x**2) * stretched - 2 * self.along_x * self.along_y * sheared
        return irfft2(self.constant * curl, self.spectrum)


PUBLISHED: Mapping[str, type[Smagorinsky | Backscatter | ZannaBolton]] = {
    "smagorinsky": Smagorinsky,
    "backscatter": Backscatter,
    "zanna_bolton": ZannaBolton,
}
"""The published closures by their names in a configuration."""


def _not_negative(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ConfigurationError(f"closure: {name} = {value}: must be at least 0")
    return value
