"""The interface of a partition, and scatter and gather for any partition."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from mpi4py import MPI

from pnode_dist.distributed.buffers import bytes_of
from pnode_dist.distributed.mesh import Mesh

Integers = npt.NDArray[np.int64]
Slices = tuple[slice, ...]
Index = tuple[slice | Integers, ...]
"""A part of an array: for each axis a slice, or the ascending indices of a part that is not contiguous."""


class Partition(Protocol):
    """A global array of `global_shape`, of which each rank of `comm` owns one part, usually a contiguous block."""

    @property
    def comm(self) -> MPI.Comm: ...

    @property
    def global_shape(self) -> tuple[int, ...]: ...

    @property
    def local_shape(self) -> tuple[int, ...]: ...

    def owned_slices(self, rank: int) -> Index:
        """Return the owned range of `rank`: for each axis a slice, or indices if the part is not contiguous."""
        ...


def communicator(place: Mesh | MPI.Comm) -> MPI.Comm:
    """Return the communicator of a partition: that of a mesh's state ranks, or the one given."""
    return place.state_comm if isinstance(place, Mesh) else place


def even_ranges(length: int, parts: int) -> list[tuple[int, int]]:
    """Split `length` items into consecutive ranges whose sizes differ by at most one, larger ones first."""
    small, larger = divmod(length, parts)
    starts = [part * small + min(part, larger) for part in range(parts + 1)]
    return list(pairwise(starts))


def scatter(source: Any, partition: Partition, root: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Distribute a global array from `root`. Collective on the partition's communicator.

    `source` is an array or tensor of shape `[..., *global_shape]` on `root`, and ignored elsewhere. Returns this rank's
    part, `[..., *local_shape]`. Raises `ValueError` on all ranks if the shape is wrong.
    """
    comm = partition.comm
    layout: Any = None
    if comm.rank == root:
        whole = source.detach().cpu() if isinstance(source, torch.Tensor) else torch.as_tensor(np.asarray(source))
        trailing = tuple(whole.shape[whole.dim() - len(partition.global_shape) :])
        layout = (tuple(whole.shape[: whole.dim() - len(trailing)]), whole.dtype, trailing == partition.global_shape)
        shape = tuple(whole.shape)
        layout = (*layout, shape)
    leading, source_dtype, fits, shape = comm.bcast(layout, root=root)
    if not fits:
        raise ValueError(f"cannot scatter shape {shape}: its last axes must be {partition.global_shape}")
    local = torch.empty((*leading, *partition.local_shape), dtype=source_dtype)
    if comm.rank == root:
        blocks = [whole[_block(partition, rank)].contiguous() for rank in range(comm.size)]
        requests = [comm.Isend([bytes_of(block), MPI.BYTE], rank) for rank, block in enumerate(blocks) if rank != root]
        local.copy_(blocks[root])
        MPI.Request.Waitall(requests)
    else:
        comm.Recv([bytes_of(local), MPI.BYTE], root)
    return local if dtype is None else local.to(dtype)


def gather(local: torch.Tensor, partition: Partition, root: int = 0) -> torch.Tensor | None:
    """Return the global array `[..., *global_shape]` on `root`, None elsewhere. Collective on the partition's comm."""
    comm = partition.comm
    leading = tuple(local.shape[: local.dim() - len(partition.local_shape)])
    if tuple(local.shape[len(leading) :]) != partition.local_shape:
        raise ValueError(f"cannot gather shape {tuple(local.shape)}: its last axes must be {partition.local_shape}")
    if comm.rank != root:
        comm.Send([bytes_of(local.detach().contiguous()), MPI.BYTE], root)
        return None
    whole = torch.empty((*leading, *partition.global_shape), dtype=local.dtype)
    for rank in range(comm.size):
        block = local.detach()
        if rank != root:
            block = torch.empty((*leading, *_extents(partition, rank)), dtype=local.dtype)
            comm.Recv([bytes_of(block), MPI.BYTE], rank)
        whole[_block(partition, rank)] = block
    return whole


def _block(partition: Partition, rank: int) -> tuple[Any, ...]:
    return (..., *partition.owned_slices(rank))


def _extents(partition: Partition, rank: int) -> list[int]:
    """Return the shape of the part that `rank` owns."""
    return [
        len(range(length)[index]) if isinstance(index, slice) else len(index)
        for index, length in zip(partition.owned_slices(rank), partition.global_shape, strict=True)
    ]


def count(shape: tuple[int, ...]) -> int:
    """Return the number of entries of an array of `shape`."""
    return math.prod(shape)
