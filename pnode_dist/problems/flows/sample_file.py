"""What a flow has drawn, and the densities that it was judged by, as one HDF5 file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from pnode_dist.report.turns import write_failure

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PlanarMap:
    """Log densities `[y, x]` at the centres `x` and `y` of cells of area `cell`; the true one is None if unknown."""

    x: Array
    y: Array
    cell: float
    flow: Array
    truth: Array | None


@dataclass(frozen=True)
class FlowContents:
    """Rows that a flow has drawn with their log densities, test rows with theirs by each model, a map of a density in
    the plane, and the ways `[time, sample, dimension]` on which samples came from noise. All is whole, in nats."""

    samples: Array
    sample_log_density: Array
    test: Array
    test_log_density: Mapping[str, Array]
    planar: PlanarMap | None
    paths: Array | None


def write_flow(path: Path, contents: FlowContents) -> None:
    """Write the file, with dimension scales, as xarray reads it. For one rank.

    `samples` and `sample_log_density`, `test` and `test_log_density_<model>`, and for a density in the plane
    `log_density` of the flow and `true_log_density` `[y, x]`, and `paths`.
    Raises `ConfigurationError` when it cannot be written.
    """
    try:
        with h5py.File(path, "w") as file:
            _store(file, "samples", contents.samples, ("sample", "dimension"))
            _store(file, "sample_log_density", contents.sample_log_density, ("sample",))
            _store(file, "test", contents.test, ("row", "dimension"))
            for name, values in contents.test_log_density.items():
                _store(file, f"test_log_density_{name}", values, ("row",))
            if contents.planar is not None:
                for name in ("x", "y"):
                    file.create_dataset(name, data=getattr(contents.planar, name)).make_scale(name)
                _store(file, "log_density", contents.planar.flow, ("y", "x"))
                if contents.planar.truth is not None:
                    _store(file, "true_log_density", contents.planar.truth, ("y", "x"))
            if contents.paths is not None:
                _store(file, "paths", contents.paths, ("time", "path", "dimension"))
    except OSError as error:
        raise write_failure(path, error) from None


def _store(file: h5py.File, name: str, values: Any, dimensions: tuple[str, ...]) -> None:
    data = file.create_dataset(name, data=values)
    for number, dimension in enumerate(dimensions):
        if dimension not in file:
            file.create_dataset(dimension, data=np.arange(values.shape[number])).make_scale(dimension)
        data.dims[number].attach_scale(file[dimension])
