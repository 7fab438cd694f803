"""What every partition can say of itself, and what follows from it alone: Vecs, tensor views, scatter and gather."""

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
"""A part of an array: one slice an axis, or the ascending indices of what is not contiguous along one of them."""


class Partition(Protocol):
    """A global array of `global_shape` of which each rank of `comm` owns one part, for the most a contiguous block."""

    @property
    def comm(self) -> MPI.Comm: ...

    @property
    def global_shape(self) -> tuple[int, ...]: ...

    @property
    def local_shape(self) -> tuple[int, ...]: ...

    def owned_slices(self, rank: int) -> Index:
        """The part of the global array that `rank` owns, one slice an axis; indices where it is not contiguous."""
        ...


def communicator(place: Mesh | MPI.Comm) -> MPI.Comm:
    """The communicator over which a partition spreads: a mesh's state ranks, or the one given."""
    return place.state_comm if isinstance(place, Mesh) else place


def even_ranges(length: int, parts: int) -> list[tuple[int, int]]:
    """`length` items cut into `parts` consecutive ranges whose sizes differ by at most one, larger ones first."""
    small, larger = divmod(length, parts)
    starts = [part * small + min(part, larger) for part in range(parts + 1)]
    return list(pairwise(starts))


def scatter(source: Any, partition: Partition, root: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Each rank's block of a global array that only `root` holds. Collective on the partition's communicator.

    `source`: on `root` an array or tensor of shape `[..., *global_shape]`, elsewhere ignored. Returns a tensor
    `[..., *local_shape]`. Raises `ValueError` on all ranks when the shape does not fit.
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
    """The global array `[..., *global_shape]` on `root`, None elsewhere. Collective on the partition's communicator."""
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
    """The shape of the part that `rank` owns."""
    return [
        len(range(length)[index]) if isinstance(index, slice) else len(index)
        for index, length in zip(partition.owned_slices(rank), partition.global_shape, strict=True)
    ]


def count(shape: tuple[int, ...]) -> int:
    """The number of entries of an array of `shape`."""
    return math.prod(shape)
