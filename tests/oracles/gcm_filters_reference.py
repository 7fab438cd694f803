"""Write `gcm_filters_reference.npz`: a state of the quasi-geostrophic problem, coarsened by GCM-Filters' diffusion.

Run by hand in an environment with gcm-filters 0.5.1: `python -m tests.oracles.gcm_filters_reference`. The package under
test is not imported. `tests/mpi/test_qg_coarsening.py` reads the file.
"""

from __future__ import annotations

from pathlib import Path

import gcm_filters
import numpy as np
import xarray as xr

from tests.oracles import quasi_geostrophic

FILE = Path(__file__).with_name("gcm_filters_reference.npz")
NY, NX, LENGTH = 24, 48, 5e5
RATIOS = (2, 3, 4)


def smoothed(field: np.ndarray, ratio: int) -> np.ndarray:
    """A field `[layer, y, x]` of the fine grid after the filter of operator 3."""
    diffusion = gcm_filters.Filter(
        filter_scale=ratio,
        dx_min=1,
        filter_shape=gcm_filters.FilterShape.GAUSSIAN,
        grid_type=gcm_filters.GridType.REGULAR,
    )
    return diffusion.apply(xr.DataArray(field, dims=("layer", "y", "x")), dims=["y", "x"]).data


def coarsened(field: np.ndarray, ratio: int) -> np.ndarray:
    """The means of the filtered field over squares of `ratio` points."""
    whole = xr.DataArray(smoothed(field, ratio), dims=("layer", "y", "x"))
    return whole.coarsen(y=ratio, x=ratio).mean().data


def spread(field: np.ndarray, ratio: int) -> np.ndarray:
    """The field of the fine grid that is constant in each cell of a coarse one, filtered."""
    return smoothed(field.repeat(ratio, axis=-2).repeat(ratio, axis=-1), ratio)


def main() -> None:
    """Write the file."""
    q = 1e-5 * np.random.default_rng(0).standard_normal((2, NY, NX))
    rate = quasi_geostrophic.tendency(q, LENGTH)
    found = {"q": q}
    for ratio in RATIOS:
        low = coarsened(q, ratio)
        found |= {
            f"q_{ratio}": low,
            f"rate_{ratio}": coarsened(rate, ratio),
            f"again_{ratio}": coarsened(spread(low, ratio), ratio),
        }
    found["spread_4"] = spread(found["q_4"], 4)
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
