"""The two-layer quasi-geostrophic equations on a whole grid in numpy, layers first, without the package under test.

Written from the equations with one dense product for each wave number, and with sums over waves in place of fast
transforms for the filters.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float64]
Spectrum = npt.NDArray[np.complex128]

EDDY = {"rd": 15e3, "delta": 0.25, "beta": 1.5e-11, "U1": 0.025, "U2": 0.0, "rek": 5.787e-7, "filterfac": 23.6}


def waves(shape: tuple[int, int], length: float) -> tuple[Field, Field]:
    """The wave numbers along y and x `[ny, nx // 2 + 1]` of the waves of a real field, in 1/m."""
    ny, nx = shape
    ky = 2 * np.pi * np.fft.fftfreq(ny, length / nx)
    kx = 2 * np.pi * np.fft.rfftfreq(nx, length / nx)
    return ky[:, None] + 0 * kx, kx + 0 * ky[:, None]


def streamfunction(q: Field, length: float, constants: Mapping[str, float]) -> Spectrum:
    """The half spectrum `[2, ny, nx // 2 + 1]` of psi, by solving two equations for each wave."""
    ky, kx = waves(q.shape[1:], length)
    upper = 1 / (constants["rd"] ** 2 * (1 + constants["delta"]))
    lower = constants["delta"] * upper
    square = kx**2 + ky**2
    matrices = np.empty((*square.shape, 2, 2))
    matrices[..., 0, 0], matrices[..., 0, 1] = -square - upper, upper
    matrices[..., 1, 0], matrices[..., 1, 1] = lower, -square - lower
    matrices[0, 0] = np.eye(2)
    right = np.moveaxis(np.fft.rfft2(q), 0, -1)
    right[0, 0] = 0
    solved: Spectrum = np.moveaxis(np.linalg.solve(matrices, right[..., None])[..., 0], -1, 0)
    return solved


def tendency(q: Field, length: float, constants: Mapping[str, float] = EDDY) -> Field:
    """dq/dt `[2, ny, nx]`."""
    ky, kx = waves(q.shape[1:], length)
    psi = streamfunction(q, length, constants)
    shear = constants["U1"] - constants["U2"]
    upper = 1 / (constants["rd"] ** 2 * (1 + constants["delta"]))
    gradients = constants["beta"] + upper * shear, constants["beta"] - constants["delta"] * upper * shear
    rates = []
    for layer, mean in enumerate((constants["U1"], constants["U2"])):
        u = np.fft.irfft2(-1j * ky * psi[layer], q.shape[1:])
        v = np.fft.irfft2(1j * kx * psi[layer], q.shape[1:])
        along_x, along_y = np.fft.rfft2((u + mean) * q[layer]), np.fft.rfft2(v * q[layer])
        rate = -1j * kx * along_x - 1j * ky * along_y - gradients[layer] * 1j * kx * psi[layer]
        if layer == 1:
            rate = rate + constants["rek"] * (kx**2 + ky**2) * psi[layer]
        rates.append(np.fft.irfft2(rate, q.shape[1:]))
    return np.stack(rates)


def damping(radians: Field, strength: float = EDDY["filterfac"]) -> Field:
    """The factors of the filter of small scales for waves of so many radians in a cell."""
    return np.where(radians <= 0.65 * np.pi, 1.0, np.exp(-strength * (radians - 0.65 * np.pi) ** 4))


def filtered(q: Field, strength: float = EDDY["filterfac"]) -> Field:
    """The field `[..., ny, nx]` after the filter of small scales."""
    shape = q.shape[-2], q.shape[-1]
    factors = damping(np.hypot(*waves(shape, float(shape[1]))), strength)
    result: Field = np.fft.irfft2(np.fft.rfft2(q) * factors, shape)
    return result


def step(q: Field, length: float, size: float, constants: Mapping[str, float] = EDDY) -> Field:
    """A classical Runge-Kutta step of `size` seconds, and the filter."""
    first = tendency(q, length, constants)
    second = tendency(q + size / 2 * first, length, constants)
    third = tendency(q + size / 2 * second, length, constants)
    fourth = tendency(q + size * third, length, constants)
    return filtered(q + size / 6 * (first + 2 * second + 2 * third + fourth), constants["filterfac"])


def coarse_factor(m: int, n: int, shape: tuple[int, int], operator: str) -> float:
    """The factor of a wave, m times along y and n times along x, in a filter to a grid of so many points."""
    radians = 2 * np.pi * np.hypot(m / shape[0], n / shape[1])
    return float(damping(radians) if operator == "sharp" else np.exp(-(radians**2) * 4 / 24))


def resampled(field: Field, shape: tuple[int, int], coarse: tuple[int, int], operator: str) -> Field:
    """The field `[..., ny, nx]` on another grid, with the damped waves of fewer than half the coarse points."""
    spectrum = np.fft.fft2(field) / (field.shape[-1] * field.shape[-2])
    ny, nx = shape
    y, x = np.arange(ny)[:, None] / ny, np.arange(nx) / nx
    result = np.zeros((*field.shape[:-2], ny, nx))
    for m in range(-coarse[0] // 2 + 1, coarse[0] // 2):
        for n in range(-coarse[1] // 2 + 1, coarse[1] // 2):
            wave = np.exp(2j * np.pi * (m * y + n * x))
            result += (coarse_factor(m, n, coarse, operator) * spectrum[..., m, n, None, None] * wave).real
    return result


def coarsened(field: Field, shape: tuple[int, int], operator: str) -> Field:
    """The field `[..., ny, nx]` on a coarser grid, wave by wave, without the waves of half its points."""
    return resampled(field, shape, shape, operator)


def refined(field: Field, shape: tuple[int, int], operator: str) -> Field:
    """The field `[..., ny, nx]` of a coarse grid on a finer one, wave by wave, without the waves of half its points."""
    return resampled(field, shape, (field.shape[-2], field.shape[-1]), operator)
