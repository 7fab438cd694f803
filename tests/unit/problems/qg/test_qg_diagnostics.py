"""Diagnostics of quasi-geostrophic turbulence: the numbers of pyqg, and the budget of energy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.qg.config import EDDY, JET
from pnode_dist.problems.qg.diagnostics import SPECTRA, densities, diagnose, flow, values
from pnode_dist.problems.qg.spectra import all_waves

# Written by pyqg_reference.py beside it.
FILE = Path(__file__).parents[3] / "oracles" / "pyqg_reference.npz"
PARAMETERS = {"eddy": replace(EDDY, L=4e5), "jet": replace(JET, L=4e5)}


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return {name: file[name] for name in file.files}


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-13 * np.abs(wanted).max()


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_flow_is_that_of_pyqg(name: str, reference: dict[str, np.ndarray]) -> None:
    found = flow(reference["q"], PARAMETERS[name])
    assert_close(found.u, reference[f"{name}_u"])
    assert_close(found.v, reference[f"{name}_v"])
    assert_close(found.vorticity, reference[f"{name}_xi"])


@pytest.mark.parametrize("name", PARAMETERS)
def test_isotropic_spectra_are_those_of_pyqg(name: str, reference: dict[str, np.ndarray]) -> None:
    found = diagnose(reference["q"][None], PARAMETERS[name])
    assert_close(found.wave_number, reference[f"{name}_k"])
    for spectrum in SPECTRA:
        assert_close(found.spectra[spectrum], reference[f"{name}_{spectrum}"])


@pytest.mark.parametrize("closure", ["smagorinsky", "backscatter"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_closure_adds_to_the_fluxes_what_pyqg_adds(name: str, closure: str, reference: dict[str, np.ndarray]) -> None:
    forcing = reference[f"{name}_{closure}"][None]
    found = diagnose(reference["q"][None], PARAMETERS[name], forcing).spectra
    for spectrum in ("KEflux", "APEflux"):
        added = reference[f"{name}_{closure}_paramspec_{spectrum}"]
        assert_close(found[spectrum], reference[f"{name}_{spectrum}"] + added)
    assert_close(found["KEspec"], reference[f"{name}_KEspec"])


def test_the_sources_of_energy_sum_to_its_rate_of_change(reference: dict[str, np.ndarray]) -> None:
    # dE/dt = - sum of H_i / H <psi_i dq_i/dt>, with a tendency by the formulas of the equations, term by term.
    parameters = PARAMETERS["eddy"]
    q, forcing = reference["q"], reference["eddy_smagorinsky"]
    # Without the shortest waves, whose products fall on others: the budget is exact.
    spectral = np.fft.rfft2(q, axes=(0, 1))
    spectral[5:12], spectral[:, 5:] = 0, 0
    q = np.fft.irfft2(spectral, s=q.shape[:2], axes=(0, 1))
    state = flow(q, parameters)

    def derivative(field: np.ndarray, axis: int) -> np.ndarray:
        waves = 2j * np.pi * np.fft.fftfreq(16) * 16 / parameters.L
        shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
        return np.fft.ifft(waves.reshape(shape) * np.fft.fft(field, axis=axis), axis=axis).real

    psi = np.moveaxis(np.fft.irfft2(state.psi, s=q.shape[:2]), 0, -1)
    mean = np.array([parameters.U1, parameters.U2])
    friction = np.stack([np.zeros_like(psi[..., 0]), parameters.rek * state.vorticity[..., 1]], -1)
    rate = (
        -(state.u + mean) * derivative(q, 1)
        - state.v * derivative(q, 0)
        - np.array(parameters.gradient) * state.v
        - friction
        + forcing
    )
    share = np.array([0.2, 0.8])
    wanted = -(psi * rate * share).mean((0, 1)).sum()
    found = densities(state, parameters, forcing)
    sources = ("KEflux", "APEflux", "APEgenspec", "KEfrictionspec")
    total = sum(all_waves(found[name], 16).sum() for name in sources)
    assert total == pytest.approx(wanted, rel=1e-10)
    # The eddies alone move energy between waves and layers, and make none.
    unforced = densities(state, parameters)
    moved = [all_waves(unforced[name], 16).sum() for name in ("KEflux", "APEflux")]
    assert abs(sum(moved)) <= 1e-12 * abs(all_waves(np.abs(unforced["KEflux"]), 16).sum())


def test_spectra_are_means_over_all_states_and_values_those_of_the_last_times(
    reference: dict[str, np.ndarray],
) -> None:
    q = reference["q"] * np.array([1.0, 2.0, 3.0, -1.0, 0.5, 2.5]).reshape(2, 3, 1, 1, 1)
    found = diagnose(q, PARAMETERS["eddy"], last=2)
    scale = np.mean([1.0, 4.0, 9.0, 1.0, 0.25, 6.25])
    np.testing.assert_allclose(found.spectra["KEspec"], scale * reference["eddy_KEspec"], rtol=1e-12)
    assert found.values["q"].shape == (2 * 2 * 16 * 16, 2)
    np.testing.assert_array_equal(found.values["q"], q[:, 1:].reshape(-1, 2))


def test_energy_and_enstrophy_at_points_are_those_of_the_whole_flow(reference: dict[str, np.ndarray]) -> None:
    parameters = replace(PARAMETERS["eddy"], U2=-0.01)
    found = values(flow(reference["q"], parameters), parameters)
    u = reference["eddy_u"] + np.array([0.025, -0.01])
    np.testing.assert_allclose(found["u"], u, rtol=1e-10)
    np.testing.assert_allclose(found["KE"], (u**2 + reference["eddy_v"] ** 2) / 2, rtol=1e-10)
    np.testing.assert_allclose(found["Ens"], reference["eddy_xi"] ** 2 / 2, rtol=1e-9)


def test_wrong_fields_are_refused_in_one_line() -> None:
    q = np.zeros((2, 4, 4, 2))
    with pytest.raises(ConfigurationError, match=r"q of shape \(4, 4, 2\): must be"):
        diagnose(q[0], EDDY)
    with pytest.raises(ConfigurationError, match=r"forcing of shape \(1, 4, 4, 2\): must have that of q"):
        diagnose(q, EDDY, q[:1])
    with pytest.raises(ConfigurationError, match="not finite"):
        diagnose(q * np.nan, EDDY)
    with pytest.raises(ConfigurationError, match="last = 0: must be at least 1"):
        diagnose(q, EDDY, last=0)
