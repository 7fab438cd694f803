"""Rollouts on a line as one HDF5 file, written part by part by the ranks that own the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.grid import GridPartition
from pnode_dist.report.turns import in_turn, write_failure

DIMENSIONS = ("trajectory", "time", "x")


@dataclass(frozen=True)
class Rollouts:
    """This rank's part of the trajectories `truth`, and under their names of the rollouts that are to follow them.

    All are `[trajectory, time, points_local]` and begin with the first sample at time 0. `interval` is the time between
    samples, `length` that of the line.
    """

    trajectories: Mapping[str, torch.Tensor]
    interval: float
    length: float


def write_rollouts(path: Path, contents: Rollouts, partition: GridPartition, mesh: Mesh) -> None:
    """Write all ranks' parts as one file. Collective on the world.

    Every data set, float32, has the dimensions trajectory, time and x, with coordinates as HDF5 dimension scales, as
    xarray and NetCDF-4 read them. Raises `ConfigurationError` on all ranks when the file cannot be written.
    """
    in_turn(lambda: _create(path, contents, partition), lambda: _write_part(path, contents, partition), partition, mesh)


def _create(path: Path, contents: Rollouts, partition: GridPartition) -> None:
    """Lay out the file: coordinates, and the data sets without their values."""
    trajectories, times = contents.trajectories["truth"].shape[:2]
    (points,) = partition.shape
    coordinates = {
        "trajectory": np.arange(trajectories),
        "time": np.arange(times) * contents.interval,
        "x": np.arange(points) * (contents.length / points),
    }
    try:
        with h5py.File(path, "w") as file:
            for name, values in coordinates.items():
                file.create_dataset(name, data=values).make_scale(name)
            for name in contents.trajectories:
                data = file.create_dataset(name, (trajectories, times, points), np.float32)
                for number, dimension in enumerate(DIMENSIONS):
                    data.dims[number].attach_scale(file[dimension])
    except OSError as error:
        raise write_failure(path, error) from None


def _write_part(path: Path, contents: Rollouts, partition: GridPartition) -> None:
    """Write what this rank owns into the file that is there."""
    ((start, stop),) = partition.owned
    try:
        with h5py.File(path, "r+") as file:
            for name, values in contents.trajectories.items():
                file[name][:, :, start:stop] = values.numpy().astype(np.float32)
    except OSError as error:
        raise write_failure(path, error) from None
