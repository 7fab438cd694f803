"""Small fields in files, and configurations of field problems over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray

from pnode_dist.problems.field.config import FieldConfig, FieldRun

TIMES, NY, NX = 30, 6, 9
VALIDATION, WINDOW = 6, 3
Array = npt.NDArray[Any]


def values(channels: int | None = None, times: int = TIMES, seed: int = 0) -> Array:
    """A seasonal cycle, a travelling wave and noise: `[time, y, x]`, or `[time, y, x, channel]`."""
    generator = np.random.default_rng(seed)
    t, y, x = np.meshgrid(np.arange(times), np.arange(NY), np.arange(NX), indexing="ij")
    season = 2.0 * np.cos(2 * np.pi * t / 12 + 0.3 * y)
    wave = np.sin(2 * np.pi * (x / NX - t / 17.0)) * np.cos(0.4 * y)
    field = 290 + 0.5 * y + season + wave + 0.2 * generator.standard_normal(t.shape)
    if channels is None:
        return np.asarray(field)
    return np.stack([field * (1 + number) + 5 * number for number in range(channels)], axis=-1)


def land() -> Array:
    """Where the fields have no values: `[y, x]`, in the middle and at an edge."""
    outside = np.zeros((NY, NX), dtype=bool)
    outside[2:4, 3:5] = outside[0, 7] = outside[5, 0] = True
    return outside


def months(times: int = TIMES) -> Array:
    """The middle of each month from January 2001."""
    starts = np.arange(times).astype("datetime64[M]") + (np.datetime64("2001-01") - np.datetime64("1970-01"))
    return starts.astype("datetime64[D]").astype("datetime64[ns]") + np.timedelta64(15, "D")


def dataset(field: Array, time: Array | None = None, masked: bool = True) -> xarray.Dataset:
    """A data set with the variable `sst` in K, latitude and longitude, and the variable `sea`, which is 1 off land."""
    if masked:
        field = np.where(land()[None] if field.ndim == 3 else land()[None, ..., None], np.nan, field)
    names = ("time", "lat", "lon", "level")[: field.ndim]
    return xarray.Dataset(
        {
            "sst": (names, field, {"units": "K"}),
            "sea": (("lat", "lon"), (~land()).astype(np.int8)),
        },
        coords={
            "time": months(len(field)) if time is None else time,
            "lat": ("lat", np.linspace(-5, 5, NY), {"units": "degrees_north"}),
            "lon": ("lon", np.arange(NX) * 360.0 / NX, {"units": "degrees_east"}),
        },
    )


def write(path: Path, data: xarray.Dataset) -> Path:
    """Write a data set as NetCDF-4 and return where it is."""
    data.to_netcdf(path, engine="h5netcdf")
    return path


def field_config(path: Path | str, **changes: Any) -> FieldConfig:
    """The table `[problem]` over a file."""
    return FieldConfig.model_validate(_problem(path) | changes)


def _problem(path: Path | str) -> dict[str, Any]:
    return {
        "path": str(path),
        "variable": "sst",
        "boundary": ("replicate", "periodic"),
        "validation": VALIDATION,
        "window": WINDOW,
    }


def config(path: Path | str, **tables: dict[str, Any]) -> FieldRun:
    """A whole configuration over a file; `tables` change single keys of its tables."""
    whole: dict[str, dict[str, Any]] = {
        "run": {"name": "test"},
        "problem": _problem(path),
        "model": {"channels": 4, "dilations": (1, 1), "harmonics": 2},
        "solver": {"step_size": 0.06},
        "training": {"epochs": 2, "batch_size": 4},
        "evaluation": {"leads": (1, 2, 3)},
    }
    for name, changes in tables.items():
        whole[name] = whole.get(name, {}) | changes
    return FieldRun.model_validate(whole)
