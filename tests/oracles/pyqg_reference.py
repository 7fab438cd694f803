"""Write `pyqg_reference.npz`: parameterisations and diagnostics of pyqg for one state on a small grid.

Run by hand in an environment with pyqg at commit 9abad33, built without pyfftw:
`python tests/oracles/pyqg_reference.py`. The package under test is not imported. `tests/mpi/test_qg_baselines.py` and
`tests/unit/problems/qg/test_qg_diagnostics.py` read the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyqg
from pyqg.diagnostic_tools import calc_ispec
from pyqg.parameterizations import BackscatterBiharmonic, Smagorinsky

FILE = Path(__file__).with_name("pyqg_reference.npz")
POINTS, LENGTH = 16, 4e5
CONFIGURATIONS = {"eddy": {"rek": 5.787e-7}, "jet": {"rek": 7e-8, "delta": 0.1, "beta": 1e-11}}
SPECTRA = ("KEspec", "Ensspec", "KEflux", "APEflux", "APEgenspec", "KEfrictionspec")
FORCED = ("paramspec_KEflux", "paramspec_APEflux")


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


def main() -> None:
    """Write the file."""
    # Full-size waves of all lengths, and a mean: the grid's shortest waves and the mean are cases of their own.
    q = 1e-5 * (0.2 + np.random.default_rng(0).standard_normal((2, POINTS, POINTS)))
    found = {"q": last(q)}
    for name, changed in CONFIGURATIONS.items():
        parameterisations = {"smagorinsky": Smagorinsky(), "backscatter": BackscatterBiharmonic()}
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
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
