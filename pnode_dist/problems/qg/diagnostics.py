"""Statistics of quasi-geostrophic turbulence: spectra of energy and its sources, and distributions at points.

Names, signs and normalisation are those of pyqg (https://pyqg.readthedocs.io). Everything here works on whole fields in
numpy, on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.qg.config import QGParameters
from pnode_dist.problems.qg.spectra import Array, Spectrum, isotropic, resolved, wave_numbers

LAYERED = ("KEspec", "Ensspec")
"""Spectra of each layer: of u^2 + v^2 in m2/s2, and of q^2 in 1/s2, times m/rad."""
SPECTRA = (*LAYERED, "KEflux", "APEflux", "APEgenspec", "KEfrictionspec")
"""All spectra. Those of the whole fluid are contributions to the rate of change of energy, in m2/s3 times m/rad."""
DISTRIBUTIONS = ("q", "u", "v", "KE", "Ens")
"""Values at points: potential vorticity in 1/s, velocities with the mean flow in m/s, energy and enstrophy."""


@dataclass(frozen=True)
class Flow:
    """The fields of one state: q in 1/s, u and v in m/s without the mean flow, vorticity in 1/s, each `[y, x, 2]`.

    `psi` and `spectral_q` are the spectra of streamfunction and potential vorticity, `[layer, ny, nx // 2 + 1]`.
    """

    q: Array
    u: Array
    v: Array
    vorticity: Array
    psi: Spectrum
    spectral_q: Spectrum


@dataclass(frozen=True)
class Diagnostics:
    """Statistics of runs.

    `wave_number` `[bin]` is in rad/m. `spectra` are the means over all states of `SPECTRA`, `[2, bin]` or `[bin]`.
    `values` are the samples `[sample, 2]` of `DISTRIBUTIONS`. `resolved` is the wave number up to which spectra count.
    """

    wave_number: Array
    spectra: Mapping[str, Array]
    values: Mapping[str, Array]
    resolved: float


def diagnose(q: Array, parameters: QGParameters, forcing: Array | None = None, last: int = 10) -> Diagnostics:
    """Return the statistics of runs `[time, ny, nx, 2]` or `[run, time, ny, nx, 2]` of q in 1/s.

    `forcing`, in the shape of q, is the forcing of dq/dt by a closure in 1/s2: its share is added to the fluxes.
    Distributions are over all points of the `last` times of each run. Raises `ConfigurationError` for other shapes, for
    values that are not finite, and for fewer than one of the last times.
    """
    _check(q, forcing, last)
    runs = q.reshape(-1, *q.shape[-4:])
    states = q.reshape(-1, *q.shape[-3:])
    forcings = [None] * len(states) if forcing is None else forcing.reshape(states.shape)
    shape = (q.shape[-3], q.shape[-2])
    sums: dict[str, Array] = {}
    for state, forced in zip(states, forcings, strict=True):
        for name, density in densities(flow(state, parameters), parameters, forced).items():
            sums[name] = sums.get(name, 0.0) + density
    spectra = {}
    for name, density in sums.items():
        wave_number, spectra[name] = isotropic(density / len(states), shape, parameters.L)
    late = runs[:, -last:].reshape(-1, *q.shape[-3:])
    parts = [values(flow(state, parameters), parameters) for state in late]
    samples = {name: np.concatenate([part[name].reshape(-1, 2) for part in parts]) for name in DISTRIBUTIONS}
    return Diagnostics(wave_number, spectra, samples, resolved(shape, parameters.L))


def flow(q: Array, parameters: QGParameters) -> Flow:
    """Return the flow of one state q `[ny, nx, 2]` in 1/s."""
    along_y, along_x = wave_numbers((q.shape[0], q.shape[1]), parameters.L)
    spectral = _spectrum(q)
    psi = np.einsum("ij...,j...->i...", _inversion(along_x**2 + along_y**2, parameters), spectral)
    u, v, vorticity = (_field(factor * psi, q) for factor in (-1j * along_y, 1j * along_x, -(along_x**2) - along_y**2))
    return Flow(q, u, v, vorticity, psi, spectral)


def values(state: Flow, parameters: QGParameters) -> dict[str, Array]:
    """Return the fields of `DISTRIBUTIONS`, each `[ny, nx, 2]`."""
    u = state.u + np.array([parameters.U1, parameters.U2])
    return {
        "q": state.q,
        "u": u,
        "v": state.v,
        "KE": (u**2 + state.v**2) / 2,
        "Ens": state.vorticity**2 / 2,
    }


def mean_energy(q: Array, parameters: QGParameters) -> float:
    """Return the kinetic energy of the eddies of one state q `[ny, nx, 2]` in m2/s2, a mean over domain and depth."""
    state = flow(q, parameters)
    share = np.array([parameters.delta, 1.0]) / (1 + parameters.delta)
    return float(((state.u**2 + state.v**2) / 2 * share).sum(-1).mean())


def densities(state: Flow, parameters: QGParameters, forcing: Array | None = None) -> dict[str, Array]:
    """Return the densities of `SPECTRA`, `[2, ny, nx // 2 + 1]` for those of each layer, else `[ny, nx // 2 + 1]`.

    - KEflux and APEflux are the transfer of kinetic and of available potential energy to a wave by advection with the
      eddies, and by `forcing` `[ny, nx, 2]` of dq/dt, if any.
    - APEgenspec is the energy that eddies take from the mean flow, KEfrictionspec what the drag at the bottom takes.
    """
    along_y, along_x = wave_numbers((state.q.shape[0], state.q.shape[1]), parameters.L)
    square, psi = along_x**2 + along_y**2, state.psi
    points = (state.q.shape[0] * state.q.shape[1]) ** 2
    share = np.array([parameters.delta, 1.0]) / (1 + parameters.delta)
    stretching = np.array([[-1, 1], [1, -1]]) * np.array(parameters.coupling)[:, None]

    def advected(field: Array, u: Array, v: Array) -> Spectrum:
        flux: Spectrum = 1j * along_x * _spectrum(u * field) + 1j * along_y * _spectrum(v * field)
        return flux

    stream = _field(psi, state.q)
    mean_u, mean_v = (state.u @ share)[..., None], (state.v @ share)[..., None]
    difference = (stream[..., 0] - stream[..., 1])[..., None]
    thickness = -advected(difference, mean_u, mean_v)[0]
    background = np.array([parameters.U1, parameters.U2])[:, None, None] * along_x
    weights = share[:, None, None]
    stretched = np.einsum("ij,j...->i...", stretching, psi)
    found = {
        "KEspec": square * np.abs(psi) ** 2,
        "Ensspec": np.abs(state.spectral_q) ** 2,
        "KEflux": (weights * (psi * advected(state.vorticity, state.u, state.v).conj()).real).sum(0),
        "APEflux": share[0] * share[1] / parameters.rd**2 * ((psi[0] - psi[1]) * thickness.conj()).real,
        "APEgenspec": (weights * background * (1j * psi.conj() * stretched).real).sum(0),
        "KEfrictionspec": -parameters.rek * share[1] * square * np.abs(psi[1]) ** 2,
    }
    if forcing is not None:
        forced = np.einsum("ij...,j...->i...", _inversion(square, parameters), _spectrum(forcing))
        found["KEflux"] += square * (weights * (psi.conj() * forced).real).sum(0)
        layers = np.einsum("ij,j...->i...", stretching, forced)
        found["APEflux"] -= (weights * (psi.conj() * layers).real).sum(0)
    return {name: density / points for name, density in found.items()}


def _spectrum(field: Array) -> Spectrum:
    """Return the spectrum `[layer, ny, nx // 2 + 1]` of `[ny, nx, layer]`."""
    return np.fft.rfft2(np.moveaxis(field, -1, 0))


def _field(spectrum: Spectrum, like: Array) -> Array:
    """Return the field `[ny, nx, layer]` of a spectrum."""
    return np.moveaxis(np.fft.irfft2(spectrum, s=like.shape[:2]), 0, -1)


def _inversion(square: Array, parameters: QGParameters) -> Array:
    """Return the matrices `[2, 2, ny, nx // 2 + 1]` from q to the streamfunction, 0 for the mean."""
    upper, lower = parameters.coupling
    determinant = square * (square + upper + lower)
    inverse = np.divide(-1, determinant, out=np.zeros_like(determinant), where=determinant > 0)
    constant = np.ones_like(square)
    return np.array([[square + lower, upper * constant], [lower * constant, square + upper]]) * inverse


def _check(q: Array, forcing: Array | None, last: int) -> None:
    if q.ndim not in (4, 5) or q.shape[-1] != 2:
        raise ConfigurationError(
            f"diagnostics: q of shape {q.shape}: must be [run, time, ny, nx, 2] or one run of them"
        )
    if forcing is not None and forcing.shape != q.shape:
        raise ConfigurationError(f"diagnostics: forcing of shape {forcing.shape}: must have that of q, {q.shape}")
    if not np.isfinite(q).all() or (forcing is not None and not np.isfinite(forcing).all()):
        raise ConfigurationError("diagnostics: q or forcing has values that are not finite")
    if last < 1:
        raise ConfigurationError(f"diagnostics: last = {last}: must be at least 1")
