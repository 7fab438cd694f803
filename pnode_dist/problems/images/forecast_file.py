"""Classified images as one HDF5 file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.report.turns import write_failure


@dataclass(frozen=True)
class Classified:
    """Images `[sample, y, x, channel]` of bytes, the numbers of their classes `[sample]`, the probabilities
    `[sample, class]` that they were given, and the names of the classes."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[Any]
    probabilities: npt.NDArray[Any]
    classes: tuple[str, ...]


def write_classified(path: Path, contents: Classified, mesh: Mesh) -> None:
    """Write what every rank has in whole. Collective on the world.

    The data sets are `image` in bytes, `label`, and `probability` in float64, with the dimensions sample, y, x, channel
    and class; `class`, the names, is a dimension scale, as xarray and NetCDF-4 read it.
    Raises `ConfigurationError` on all ranks when the file cannot be written.
    """
    agreed(mesh, lambda: _write(path, contents) if mesh.is_root else None)


def _write(path: Path, contents: Classified) -> None:
    named = {
        "image": (contents.images, ("sample", "y", "x", "channel")),
        "label": (contents.labels, ("sample",)),
        "probability": (contents.probabilities.astype(np.float64), ("sample", "class")),
    }
    try:
        with h5py.File(path, "w") as file:
            file.create_dataset("class", data=list(contents.classes), dtype=h5py.string_dtype()).make_scale("class")
            for name, extent in zip(("sample", "y", "x", "channel"), contents.images.shape, strict=True):
                file.create_dataset(name, data=np.arange(extent)).make_scale(name)
            for name, (values, dimensions) in named.items():
                data = file.create_dataset(name, data=values)
                for number, dimension in enumerate(dimensions):
                    data.dims[number].attach_scale(file[dimension])
    except OSError as error:
        raise write_failure(path, error) from None
