"""Isotropic spectra of whole fields on a doubly periodic grid, with the binning of pyqg (https://pyqg.readthedocs.io).

A density is a quadratic quantity of each wave, `[..., ny, nx // 2 + 1]` in the order of numpy.fft.rfft2, divided by the
squared number of points: its sum over all waves, those that rfft2 leaves out included, is the mean over the domain.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Spectrum = npt.NDArray[np.complex128]

_FILTER_START = 0.65 * math.pi


def wave_numbers(shape: tuple[int, int], length: float) -> tuple[Array, Array]:
    """Return the wave numbers in rad/m along y `[ny, 1]` and along x `[1, nx // 2 + 1]`.

    `shape` is (ny, nx), and `length` the length of the domain along x in m. The cells are squares.
    """
    ny, nx = shape
    step_y, step_x = _steps(shape, length)
    modes = np.arange(float(ny))
    # As numpy.fft, with the shortest wave of an even number negative.
    modes[(ny + 1) // 2 :] -= ny
    return step_y * modes[:, None], step_x * np.arange(float(nx // 2 + 1))[None, :]


def _steps(shape: tuple[int, int], length: float) -> tuple[float, float]:
    """Return the distances of wave numbers along y and along x in rad/m."""
    return 2 * math.pi / (length * shape[0] / shape[1]), 2 * math.pi / length


def all_waves(density: Array, nx: int) -> Array:
    """Return the density `[..., ny, nx // 2 + 1]` with each wave counted as often as the whole plane has it: 2 or 1."""
    weights: Array = np.full(nx // 2 + 1, 2.0)
    weights[0] = 1
    if nx % 2 == 0:
        weights[-1] = 1
    weighted: Array = density * weights
    return weighted


def isotropic(density: Array, shape: tuple[int, int], length: float, summed: bool = False) -> tuple[Array, Array]:
    """Return the wave numbers `[bin]` in rad/m and the isotropic spectrum `[..., bin]` of a density.

    Bins are rings as wide as the diagonal of a cell of wave numbers, up to the shortest wave along an axis. A bin is
    the mean of its waves times the circumference of its ring, as in calc_ispec of pyqg, which is smooth where a ring
    has few waves. With `summed` it is the sum of its waves divided by the width: the integral over bins is then the
    part of the mean over the domain that these waves make. `shape` and `length` are those of `wave_numbers`.
    """
    along_y, along_x = wave_numbers(shape, length)
    step_y, step_x = _steps(shape, length)
    # Diagonal waves lie on the edges of rings: rounded as pyqg rounds them, they fall into the same bins.
    width = math.sqrt(step_x**2 + step_y**2)
    radius = np.sqrt(along_x**2 + along_y**2)
    inner = np.arange(0, min(np.abs(along_y).max(), along_x.max()), width)
    outer = np.append(inner[1:], np.nextafter(inner[-1] + width, math.inf))
    weighted = all_waves(density, shape[1])
    spectrum = np.empty((*density.shape[:-2], len(inner)))
    for number, (start, stop) in enumerate(zip(inner, outer, strict=True)):
        waves = weighted[..., (radius >= start) & (radius < stop)]
        if summed:
            spectrum[..., number] = waves.sum(-1) / width
        else:
            circumference = math.pi * (start + width / 2) / (step_x * step_y)
            spectrum[..., number] = waves.mean(-1) * circumference
    return inner + width / 2, spectrum


def resolved(shape: tuple[int, int], length: float) -> float:
    """Return the wave number in rad/m at which the filter of small scales begins, about two thirds of the largest."""
    _, along_x = wave_numbers(shape, length)
    filtered = along_x[0] * length / shape[1] > _FILTER_START
    return float(along_x[0][np.argmax(filtered)])
