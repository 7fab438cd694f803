"""Write `pyqg_reference.npz`: parameterisations and diagnostics of pyqg for one state, and published scores of runs.

Run by hand in an environment with pyqg at commit 9abad33, built without pyfftw, and `online_metrics` of
pyqg_parameterization_benchmarks at commit 6395fb4: `python tests/oracles/pyqg_reference.py`. The package under test is
not imported.
`tests/mpi/test_qg_baselines.py`, `tests/unit/problems/qg/test_qg_diagnostics.py` and `test_qg_scores.py` beside it read
the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyqg
import xarray as xr
from pyqg.diagnostic_tools import calc_ispec
from pyqg.parameterizations import BackscatterBiharmonic, Smagorinsky, ZannaBolton2020
from pyqg_parameterization_benchmarks.online_metrics import diagnostic_differences, diagnostic_similarities

FILE = Path(__file__).with_name("pyqg_reference.npz")
POINTS, LENGTH = 16, 4e5
CONFIGURATIONS = {"eddy": {"rek": 5.787e-7}, "jet": {"rek": 7e-8, "delta": 0.1, "beta": 1e-11}}
SPECTRA = ("KEspec", "Ensspec", "KEflux", "APEflux", "APEgenspec", "KEfrictionspec")
FORCED = ("paramspec_KEflux", "paramspec_APEflux")
# Points and amplitude of the random runs whose scores are computed, and the parameterisation of each.
RUNS = {"truth": (24, 1.0, None), "run": (16, 0.8, Smagorinsky(0.1)), "baseline": (16, 0.5, None)}
TIMES = 2


def last(array: np.ndarray) -> np.ndarray:
    """`[layer, y, x]` as `[y, x, layer]`."""
    return np.moveaxis(np.asarray(array), 0, -1)


def forcing(model: pyqg.QGModel) -> np.ndarray:
    """The forcing of dq/dt `[layer, y, x]` by the model's parameterisation, as its kernel adds it."""
    model._invert()
    model.dqhdt[:] = 0
    if model.uv_parameterization is not None:
        model._do_uv_subgrid_parameterization()
    else:
        model._do_q_subgrid_parameterization()
    return model.ifft(np.array(model.dqhdt))


def isotropic(model: pyqg.QGModel, density: np.ndarray) -> np.ndarray:
    """The isotropic spectrum of each layer, or of a quantity that has no layers."""
    if density.ndim == 2:
        return calc_ispec(model, density)[1]
    return np.stack([calc_ispec(model, layer)[1] for layer in density])


def scores() -> dict[str, np.ndarray]:
    """Random runs `[time, y, x, layer]`, the forcing of one of them, and their differences and scores."""
    found, datasets = {}, {}
    for number, (name, (points, amplitude, parameterisation)) in enumerate(RUNS.items()):
        random = np.random.default_rng(number + 1)
        states = 1e-5 * amplitude * random.standard_normal((TIMES, 2, points, points))
        model = pyqg.QGModel(nx=points, log_level=0, parameterization=parameterisation)
        fields, densities, forcings = {"q": [], "ufull": [], "vfull": []}, {}, []
        for state in states:
            # Without the shortest waves: the published program takes the vorticity from u and v, which lack them.
            spectral = np.fft.rfft2(state)
            spectral[:, points // 2], spectral[:, :, points // 2] = 0, 0
            model.q = np.fft.irfft2(spectral).astype(np.float32).astype(np.float64)
            model._invert()
            if parameterisation is not None:
                forcings.append(last(forcing(model)))
            model._calc_derived_fields()
            background = model.Ubg[:, None, None]
            for key, value in (("q", model.q), ("ufull", model.u + background), ("vfull", model.v)):
                fields[key].append(np.array(value))
            for spectrum in (*SPECTRA, *FORCED):
                density = np.asarray(model.diagnostics[spectrum]["function"](model))
                densities[spectrum] = densities.get(spectrum, 0) + density / TIMES
        datasets[name] = xr.Dataset(
            {key: (("time", "lev", "y", "x"), np.stack(value)) for key, value in fields.items()}
            | {key: (("lev", "l", "k")[-value.ndim :], value) for key, value in densities.items()},
            coords={"k": model.kk, "l": model.ll},
        )
        found[f"scored_{name}"] = np.stack([last(field) for field in fields["q"]]).astype(np.float32)
        if forcings:
            found[f"scored_{name}_forcing"] = np.stack(forcings)
    similar = diagnostic_similarities(datasets["run"], target=datasets["truth"], baseline=datasets["baseline"])
    found |= {f"similarity_{key.split('diff_')[1]}": np.asarray(value) for key, value in similar.items()}
    differ = diagnostic_differences(datasets["run"], datasets["truth"])
    return found | {f"difference_{key.split('diff_')[1]}": np.asarray(value) for key, value in differ.items()}


def main() -> None:
    """Write the file."""
    # Full-size waves of all lengths, and a mean: the grid's shortest waves and the mean are cases of their own.
    q = 1e-5 * (0.2 + np.random.default_rng(0).standard_normal((2, POINTS, POINTS)))
    found = {"q": last(q)}
    for name, changed in CONFIGURATIONS.items():
        parameterisations = {
            "smagorinsky": Smagorinsky(),
            "backscatter": BackscatterBiharmonic(),
            "zanna_bolton": ZannaBolton2020(),
        }
        for kind, parameterisation in parameterisations.items():
            model = pyqg.QGModel(nx=POINTS, L=LENGTH, log_level=0, parameterization=parameterisation, **changed)
            model.q = q
            found[f"{name}_{kind}"] = last(forcing(model))
            model._calc_derived_fields()
            for spectrum in FORCED:
                density = np.asarray(model.diagnostics[spectrum]["function"](model))
                found[f"{name}_{kind}_{spectrum}"] = isotropic(model, density)
        found[f"{name}_k"] = calc_ispec(model, model.diagnostics["KEfrictionspec"]["function"](model))[0]
        for spectrum in SPECTRA:
            density = np.asarray(model.diagnostics[spectrum]["function"](model))
            found[f"{name}_{spectrum}"] = isotropic(model, density)
        found |= {f"{name}_u": last(model.u), f"{name}_v": last(model.v), f"{name}_xi": last(model.xi)}
    np.savez_compressed(FILE, **found, **scores())


if __name__ == "__main__":
    main()
