"""A file that all ranks write piece by piece, for parts that are contiguous and for parts that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import DensePartition, GraphPartition, GridPartition, Mesh
from pnode_dist.report.dataset_file import Later, OtherChannels, Variable, write_dataset
from pnode_dist.report.dataset_stream import DatasetStream
from tests.mpi.conftest import SPLITS

pytestmark = pytest.mark.mpi

RING = np.array([[*range(9)], [*range(1, 9), 0]])
PARTITIONS: dict[str, Any] = {
    "blocks": lambda mesh: OtherChannels(GridPartition(mesh, (8, 6), 2)),
    "scattered": lambda mesh: GraphPartition(mesh, RING, 9, 2, np.arange(9) % mesh.state_ranks),
    "fewer entries than ranks": lambda mesh: DensePartition(mesh, 2),
}


@pytest.mark.parametrize("name", PARTITIONS)
def test_pieces_of_all_ranks_make_the_file_that_is_written_at_once(name: str, directory: Path) -> None:
    for state, data in dict.fromkeys((SPLITS[0], SPLITS[-1])):
        with Mesh(state, data) as mesh:
            partition = PARTITIONS[name](mesh)
            shape = (3, 2, *partition.global_shape)
            whole = torch.arange(float(np.prod(shape)), dtype=torch.float64).reshape(shape)
            own = whole[(..., *partition.owned_slices(partition.comm.rank))]
            axes = ("start", "lead", *(f"axis_{number}" for number in range(len(partition.global_shape))))

            def variable(values: Any, axes: Any = axes, partition: Any = partition) -> dict[str, Variable]:
                return {"u": Variable(axes, values, {}, np.float64, partition)}

            write_dataset(directory / "whole.h5", variable(own), mesh)
            with DatasetStream(directory / "pieces.h5", variable(Later(tuple(own.shape))), mesh) as stream:
                for lead in (1, 0):
                    stream.write("u", (slice(0, 2), lead), own[:2, lead])
                    stream.write("u", (2, lead), own[2, lead])
            for path in ("whole.h5", "pieces.h5"):
                with h5py.File(directory / path) as file:
                    assert np.array_equal(file["u"][()], whole.numpy())
        MPI.COMM_WORLD.Barrier()
