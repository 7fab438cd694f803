"""The two-layer quasi-geostrophic equations on a doubly periodic partitioned grid, by Fourier transforms.

The discretisation is that of pyqg (https://pyqg.readthedocs.io): products are formed on the grid without dealiasing,
and after each step a filter removes the smallest scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pnode_dist.exchange.fourier import irfft2, rfft2
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.spectral import SpectralPartition
from pnode_dist.problems.qg.config import EDDY, QGParameters

LAYERS = ("upper", "lower")
Closure = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The forcing of dq/dt in 1/s^2 from q in 1/s and u, v in m/s, all `[..., ny_local, nx_local, 2]`."""

_CUTOFF = 0.65 * math.pi
_NOISE = 0.1


class QGTendency(nn.Module):
    """The equations of `QGParameters`, with or without a closure, as a right-hand side for `NeuralODE`.

    A state is the potential vorticity anomaly q in 1/s, `[..., ny_local, nx_local, 2]`, the upper layer first. The
    grid is periodic and its cells are squares. `closure(q, u, v)` is added to dq/dt; a module is registered.

    An evaluation has four transforms, each of all its fields at once: q, the velocities, the fluxes of q, and dq/dt.
    Slabs along y (`processes=(ranks, 1)`) save messages. `dtype` is that of the states, single or double precision;
    the coefficients are rounded from double precision. Collective on the partition's communicator.
    """

    own: torch.Tensor
    other: torch.Tensor
    drag: torch.Tensor
    gradient: torch.Tensor
    background: torch.Tensor
    kx: torch.Tensor
    ky: torch.Tensor

    def __init__(
        self,
        partition: GridPartition,
        parameters: QGParameters = EDDY,
        closure: Closure | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.partition, self.constants, self.closure = partition, parameters, closure
        self.spectrum = SpectralPartition(partition)
        ky, kx = self.spectrum.wavenumbers(lengths(partition, parameters))
        square = kx**2 + ky**2
        upper, lower = parameters.coupling
        determinant = square * (square + upper + lower)
        # The mean of q has no streamfunction.
        inverse = torch.where(determinant > 0, -1 / determinant, 0.0)
        coupling = torch.tensor([upper, lower], dtype=torch.float64)
        coefficients = {
            "own": (square + coupling.flip(0)) * inverse,
            "other": coupling * inverse,
            "drag": parameters.rek * square * torch.tensor([0.0, 1.0], dtype=torch.float64),
            "gradient": torch.tensor(parameters.gradient, dtype=torch.float64),
            "background": torch.tensor([parameters.U1, parameters.U2], dtype=torch.float64),
            "kx": kx,
            "ky": ky,
        }
        for name, value in coefficients.items():
            self.register_buffer(name, value.to(dtype), persistent=False)

    def inverted(self, q: torch.Tensor) -> torch.Tensor:
        """Return the spectrum of the streamfunction in m^2/s, `[..., *spectrum local, 2]`, complex. Collective."""
        return self._streamfunction(rfft2(q, self.spectrum))

    def velocities(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the velocities u and v in m/s in the shape of q, without the background flow. Collective."""
        return self._velocities(self.inverted(q))

    def forward(self, t: torch.Tensor | float, q: torch.Tensor) -> torch.Tensor:
        """Return dq/dt in 1/s^2 in the shape of q; `t` is unused. Collective on the partition's communicator."""
        psi = self.inverted(q)
        u, v = self._velocities(psi)
        along_x, along_y = rfft2(torch.cat([(u + self.background) * q, v * q], dim=-1), self.spectrum).chunk(2, dim=-1)
        advection = 1j * self.kx * (along_x + self.gradient * psi) + 1j * self.ky * along_y
        tendency = irfft2(self.drag * psi - advection, self.spectrum)
        return tendency if self.closure is None else tendency + self.closure(q, u, v)

    def _streamfunction(self, spectral: torch.Tensor) -> torch.Tensor:
        return self.own * spectral + self.other * spectral.flip(-1)

    def _velocities(self, psi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([-1j * self.ky * psi, 1j * self.kx * psi], dim=-1)
        u, v = irfft2(both, self.spectrum).chunk(2, dim=-1)
        return u, v


class SmallScaleFilter(nn.Module):
    """The exponential filter of pyqg, a map m(t, q) to apply after each step.

    It leaves waves of fewer than 0.65 pi radians per cell unchanged, and multiplies others by
    exp(-filterfac (radians per cell - 0.65 pi)^4). Collective on the partition's communicator.
    """

    factors: torch.Tensor

    def __init__(
        self, partition: GridPartition, parameters: QGParameters = EDDY, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        self.spectrum = SpectralPartition(partition)
        factors = filter_factors(self.spectrum, parameters.filterfac)
        self.register_buffer("factors", factors.to(dtype), persistent=False)

    def forward(self, t: torch.Tensor | float, q: torch.Tensor) -> torch.Tensor:
        """Return the filtered q `[..., ny_local, nx_local, channels]`; `t` is unused. Collective."""
        return irfft2(self.factors * rfft2(q, self.spectrum), self.spectrum)


class ResolvedWaves(nn.Module):
    """The part of a field that `SmallScaleFilter` leaves unchanged. Collective on the partition's communicator."""

    mask: torch.Tensor

    def __init__(self, partition: GridPartition, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.spectrum = SpectralPartition(partition)
        self.register_buffer("mask", (_beyond(self.spectrum) == 0).to(dtype), persistent=False)

    def forward(self, field: torch.Tensor) -> torch.Tensor:
        """Return the waves of at most 0.65 pi radians per cell of `[..., ny_local, nx_local, channels]`. Collective."""
        return irfft2(self.mask.to(field.dtype) * rfft2(field, self.spectrum), self.spectrum)


def filter_factors(spectrum: SpectralPartition, strength: float) -> torch.Tensor:
    """Return the factors `[*spectrum local, 1]` of `SmallScaleFilter`, float64. Not collective."""
    return torch.exp(-strength * _beyond(spectrum) ** 4)


def _beyond(spectrum: SpectralPartition) -> torch.Tensor:
    """Return the radians per cell beyond the cutoff `[*spectrum local, 1]`, 0 for waves below it."""
    ky, kx = spectrum.wavenumbers([float(points) for points in spectrum.grid.shape])
    return ((kx**2 + ky**2).sqrt() - _CUTOFF).clamp(min=0.0)


def lengths(partition: GridPartition, parameters: QGParameters) -> tuple[float, float]:
    """Return the lengths of the domain along y and x in m, of which the cells are squares."""
    ny, nx = partition.shape
    return parameters.L * ny / nx, parameters.L


def initial_state(partition: GridPartition, amplitude: float, seed: int, number: int = 0) -> torch.Tensor:
    """Return this rank's block `[ny_local, nx_local, 2]`, float64, of the random q for `seed` and `number`, in 1/s.

    As in pyqg the lower layer is at rest, and q of the upper one is noise that depends on x alone, uniform over a range
    of `amplitude`, and noise over a tenth of it at each point. Each row has a generator of its own and no mean, so that
    the values have the same bits for every number of ranks and every block. Not collective.
    """
    rows, columns = partition.owned
    bands = _noise(partition, [seed, number])
    upper = [amplitude * (bands + _NOISE * _noise(partition, [seed, number, 1 + row])) for row in range(*rows)]
    q = torch.zeros(partition.local_shape, dtype=torch.float64)
    for row, values in enumerate(upper):
        q[row, :, 0] = torch.from_numpy(values[slice(*columns)])
    return q


def _noise(partition: GridPartition, seed: list[int]) -> npt.NDArray[np.float64]:
    """Return uniform noise along a whole row, with a range of 1 and no mean."""
    values: npt.NDArray[np.float64] = np.random.default_rng(seed).uniform(0.0, 1.0, partition.shape[1])
    values -= values.mean()
    return values
