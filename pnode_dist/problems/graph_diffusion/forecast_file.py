"""Rollouts on a mesh as one HDF5 file, written part by part by the ranks that own the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.graph import GraphPartition
from pnode_dist.problems.graph_diffusion.mesh import IrregularMesh
from pnode_dist.report.turns import in_turn, write_failure

DIMENSIONS = ("trajectory", "time", "node")


@dataclass(frozen=True)
class Conductivities:
    """The true and the learnt conductivity `[temperature]`, and the constant one that fits best."""

    temperature: torch.Tensor
    true: torch.Tensor
    learnt: torch.Tensor
    constant: float


@dataclass(frozen=True)
class Rollouts:
    """This rank's part of the trajectories `truth`, and under their names of the rollouts that are to follow them.

    All are `[trajectory, time, local_nodes]` and begin with the initial state at time 0. `interval` is the time between
    samples.
    """

    trajectories: Mapping[str, torch.Tensor]
    interval: float
    nodes: IrregularMesh
    conductivities: Conductivities


def write_rollouts(path: Path, contents: Rollouts, partition: GraphPartition, mesh: Mesh) -> None:
    """Write all ranks' parts as one file. Collective on the world.

    Every trajectory, float32, has the dimensions trajectory, time and node, with coordinates as HDF5 dimension scales,
    as xarray and NetCDF-4 read them. `x`, `y` `[node]` and `edge_index` `[end, edge]` are the mesh. Raises
    `ConfigurationError` on all ranks when the file cannot be written.
    """
    in_turn(lambda: _create(path, contents, partition), lambda: _write_part(path, contents, partition), partition, mesh)


def _create(path: Path, contents: Rollouts, partition: GraphPartition) -> None:
    """Lay out the file: coordinates, the mesh and the conductivities, and the trajectories without their values."""
    trajectories, times = contents.trajectories["truth"].shape[:2]
    nodes, found = contents.nodes, contents.conductivities
    scales = {
        "trajectory": np.arange(trajectories),
        "time": np.arange(times) * contents.interval,
        "node": np.arange(partition.global_shape[0]),
        "edge": np.arange(nodes.edge_index.shape[1]),
        "end": np.arange(2),
        "temperature": found.temperature.numpy(),
    }
    tables = {
        "x": (nodes.points[:, 0], ("node",)),
        "y": (nodes.points[:, 1], ("node",)),
        "edge_index": (nodes.edge_index, ("end", "edge")),
        "conductivity_true": (found.true.numpy(), ("temperature",)),
        "conductivity_learnt": (found.learnt.numpy(), ("temperature",)),
    }
    try:
        with h5py.File(path, "w") as file:
            for name, values in scales.items():
                file.create_dataset(name, data=values).make_scale(name)
            for name, (values, dimensions) in tables.items():
                _label(file, file.create_dataset(name, data=values), dimensions)
            file.create_dataset("conductivity_constant", data=found.constant)
            for name in contents.trajectories:
                shape = (trajectories, times, partition.global_shape[0])
                _label(file, file.create_dataset(name, shape, np.float32), DIMENSIONS)
    except OSError as error:
        raise write_failure(path, error) from None


def _label(file: h5py.File, data: h5py.Dataset, dimensions: tuple[str, ...]) -> None:
    for number, name in enumerate(dimensions):
        data.dims[number].attach_scale(file[name])


def _write_part(path: Path, contents: Rollouts, partition: GraphPartition) -> None:
    """Write what this rank owns into the file that is there."""
    if len(partition.owned) == 0:
        return
    try:
        with h5py.File(path, "r+") as file:
            for name, values in contents.trajectories.items():
                file[name][:, :, partition.owned] = values.numpy().astype(np.float32)
    except OSError as error:
        raise write_failure(path, error) from None
