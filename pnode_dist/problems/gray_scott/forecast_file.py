"""Rollouts of computed trajectories as one HDF5 file, written part by part by the ranks that own the parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.grid import GridPartition
from pnode_dist.report.turns import in_turn, write_failure

DIMENSIONS = ("trajectory", "time", "y", "x", "species")


@dataclass(frozen=True)
class Rollouts:
    """This rank's part of rollouts, and of the trajectories that they are to follow.

    `forecast` and `truth` are `[trajectory, time, ny_local, nx_local, species]`, both beginning with the initial
    state at time 0; `mean` `[species]` is that of the training trajectories. `interval` is the time between samples,
    `domain` the lengths along y and x.
    """

    forecast: torch.Tensor
    truth: torch.Tensor
    mean: torch.Tensor
    interval: float
    domain: tuple[float, float]
    species: tuple[str, ...]


def write_rollouts(path: Path, contents: Rollouts, partition: GridPartition, mesh: Mesh) -> None:
    """Write all ranks' parts as one file. Collective on the world.

    The data sets `forecast` and `truth`, float32, have the dimensions trajectory, time, y, x and species, with
    coordinates as HDF5 dimension scales, as xarray and NetCDF-4 read them; `training_mean` has the dimension species.
    No rank holds more than its own part. Raises `ConfigurationError` on all ranks when the file cannot be written.
    """
    in_turn(lambda: _create(path, contents, partition), lambda: _write_part(path, contents, partition), partition, mesh)


def _create(path: Path, contents: Rollouts, partition: GridPartition) -> None:
    """Lay out the file: coordinates, and the data sets without their values."""
    trajectories, times = contents.truth.shape[:2]
    (ny, nx), (ly, lx) = partition.shape, contents.domain
    coordinates = {
        "trajectory": np.arange(trajectories),
        "time": np.arange(times) * contents.interval,
        "y": np.arange(ny) * (ly / ny),
        "x": np.arange(nx) * (lx / nx),
    }
    try:
        with h5py.File(path, "w") as file:
            for name, values in coordinates.items():
                file.create_dataset(name, data=values).make_scale(name)
            species = file.create_dataset("species", data=list(contents.species), dtype=h5py.string_dtype())
            species.make_scale("species")
            shape = (trajectories, times, ny, nx, len(contents.species))
            for name in ("forecast", "truth"):
                _label(file, file.create_dataset(name, shape, np.float32), DIMENSIONS)
            _label(file, file.create_dataset("training_mean", data=contents.mean.numpy()), ("species",))
    except OSError as error:
        raise write_failure(path, error) from None


def _label(file: h5py.File, data: h5py.Dataset, dimensions: tuple[str, ...]) -> None:
    for number, name in enumerate(dimensions):
        data.dims[number].attach_scale(file[name])


def _write_part(path: Path, contents: Rollouts, partition: GridPartition) -> None:
    """Write what this rank owns into the file that is there."""
    (y0, y1), (x0, x1) = partition.owned
    try:
        with h5py.File(path, "r+") as file:
            for name, values in (("forecast", contents.forecast), ("truth", contents.truth)):
                file[name][:, :, y0:y1, x0:x1] = values.numpy().astype(np.float32)
    except OSError as error:
        raise write_failure(path, error) from None
