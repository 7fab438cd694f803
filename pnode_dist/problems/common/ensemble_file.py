"""Rollouts of an ensemble of small systems as one HDF5 file, written part by part by the ranks that own the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.batch import BatchPartition
from pnode_dist.report.turns import in_turn, write_failure

DIMENSIONS = ("time", "trajectory", "component")


@dataclass(frozen=True)
class EnsembleRollouts:
    """This rank's part of rollouts, and of the trajectories that they are to follow.

    `forecast` and `truth` are `[time, trajectory_local, component]` and begin with the initial state, `times` `[time]`
    are those of the samples, `components` the names of the state's components and
    `scale` `[component]` the units in which errors are given. `others` are further
    forecasts in the shape of `truth`, and `series` further figures `[time]`, the same on every rank.
    """

    forecast: torch.Tensor
    truth: torch.Tensor
    times: npt.NDArray[Any]
    components: tuple[str, ...]
    scale: npt.NDArray[Any]
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)
    series: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def forecasts(self) -> dict[str, torch.Tensor]:
        """All that is stored in the shape of `truth`, by name."""
        return {"forecast": self.forecast, "truth": self.truth, **self.others}


def write_ensemble(path: Path, contents: EnsembleRollouts, partition: BatchPartition, mesh: Mesh) -> None:
    """Write all ranks' parts as one file. Collective on the world.

    The data sets `forecast`, `truth` and those of `others`, float64, have the dimensions time, trajectory and
    component, with coordinates as HDF5 dimension scales, as xarray and NetCDF-4 read them; `scale` has the
    dimension component, and those of `series` time.
    Raises `ConfigurationError` on all ranks when the file cannot be written.
    """
    in_turn(lambda: _create(path, contents, partition), lambda: _write_part(path, contents, partition), partition, mesh)


def _create(path: Path, contents: EnsembleRollouts, partition: BatchPartition) -> None:
    """Lay out the file: coordinates, series, and the data sets without their values."""
    trajectories = partition.global_shape[0]
    shape = (len(contents.times), trajectories, len(contents.components))
    try:
        with h5py.File(path, "w") as file:
            for name, values in (("time", contents.times), ("trajectory", np.arange(trajectories))):
                file.create_dataset(name, data=values).make_scale(name)
            components = file.create_dataset("component", data=list(contents.components), dtype=h5py.string_dtype())
            components.make_scale("component")
            for name in contents.forecasts():
                _label(file, file.create_dataset(name, shape, np.float64), DIMENSIONS)
            _label(file, file.create_dataset("scale", data=contents.scale), ("component",))
            for name, values in contents.series.items():
                _label(file, file.create_dataset(name, data=values), ("time",))
    except OSError as error:
        raise write_failure(path, error) from None


def _label(file: h5py.File, data: h5py.Dataset, dimensions: tuple[str, ...]) -> None:
    for number, name in enumerate(dimensions):
        data.dims[number].attach_scale(file[name])


def _write_part(path: Path, contents: EnsembleRollouts, partition: BatchPartition) -> None:
    """Write what this rank owns into the file that is there."""
    begin, end = partition.owned
    try:
        with h5py.File(path, "r+") as file:
            for name, values in contents.forecasts().items():
                file[name][:, begin:end] = values.numpy()
    except OSError as error:
        raise write_failure(path, error) from None
