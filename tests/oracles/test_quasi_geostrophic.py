"""The numpy equations are those of pyqg-jax."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.oracles import quasi_geostrophic

LENGTH = 5e5


def test_the_tendency_and_the_filter_are_those_of_pyqg_jax() -> None:
    with np.load(Path(__file__).with_name("qg_reference.npz")) as file:
        names = ("q", "eddy_tendency", "eddy_filtered")
        q, rate, smooth = (np.moveaxis(file[name], -1, 0) for name in names)
    found = quasi_geostrophic.tendency(q, LENGTH)
    np.testing.assert_allclose(found, rate, rtol=0, atol=1e-12 * np.abs(rate).max())
    np.testing.assert_allclose(quasi_geostrophic.filtered(q), smooth, rtol=0, atol=1e-12 * np.abs(smooth).max())
