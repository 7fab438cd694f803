"""What every partition can say of itself, and what follows from it alone: Vecs, tensor views, scatter and gather."""

from __future__ import annotations

import copy
import ctypes
import math
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.buffers import bytes_of
from pnode_dist.mesh import Mesh

Integers = npt.NDArray[np.int64]
Slices = tuple[slice, ...]
Index = tuple[slice | Integers, ...]
"""A part of an array: one slice an axis, or the ascending indices of what is not contiguous along one of them."""


HOST = torch.device("cpu")


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


def vec_device(device: torch.device) -> torch.device:
    """Where PETSc keeps vectors for tensors on `device`: there too if it was built for it, else in the host's memory.

    Written after PETSc's manual, and untested on hardware: only `cuda`, for a PETSc configured with it.
    """
    there = device.type == "cuda" and PETSc.Sys.hasExternalPackage("cuda")
    return device if there else HOST


def create_vec(comm: MPI.Comm, local_size: int, device: torch.device = HOST) -> PETSc.Vec:
    """A PETSc MPI Vec with `local_size` entries on this rank, in memory of a `vec_device`. Collective on `comm`."""
    if device is HOST:
        return PETSc.Vec().createMPI((local_size, None), comm=comm)
    vec = PETSc.Vec().create(comm=comm)
    vec.setSizes((local_size, None))
    vec.setType(PETSc.Vec.Type.CUDA)
    vec.zeroEntries()
    return vec


def view(vec: PETSc.Vec, shape: tuple[int, ...], device: torch.device = HOST) -> torch.Tensor:
    """This rank's entries of `vec` as a tensor of `shape`, in PETSc's scalar type, sharing memory on its `vec_device`.

    The view keeps the Vec's memory alive. Call `wrote` after writing through it.
    """
    if device is not HOST:
        return _exchanged(vec).view(shape)
    # Vecs handed to callbacks are locked for reading, which array_w refuses; whoever asked for the view knows better.
    address = vec.array_r.__array_interface__["data"][0]
    size = vec.getLocalSize()
    if size == 0:
        return torch.empty(shape, dtype=scalar_dtype())
    buffer = (ctypes.c_char * (size * np.dtype(PETSc.ScalarType).itemsize)).from_address(address)
    # Another reference to the Vec: a view that outlives the solver, such as one that f keeps, shows memory in use.
    buffer.vec = copy.copy(vec)
    return torch.frombuffer(buffer, dtype=scalar_dtype()).view(shape)


def _exchanged(vec: PETSc.Vec) -> torch.Tensor:
    """This rank's entries of a Vec on any device, through DLPack, which keeps the Vec alive as long as the tensor."""
    try:
        capsule = vec.toDLPack("rw")
    except PETSc.Error:
        # It is locked: PETSc lends it to a callback for reading.
        capsule = vec.toDLPack("r")
    return torch.utils.dlpack.from_dlpack(capsule)


def wrote(vec: PETSc.Vec, device: torch.device = HOST) -> None:
    """Tell PETSc that a Vec was written to through a view: it caches norms, and on a device which memory is newer."""
    if device is not HOST:
        vec.toDLPack("w")
    vec.stateIncrease()


def fill(vec: PETSc.Vec, values: torch.Tensor, device: torch.device = HOST) -> None:
    """Copy this rank's entries, in a row, into a Vec on its `vec_device`."""
    view(vec, (values.numel(),), device).copy_(values)
    wrote(vec, device)


@cache
def scalar_dtype() -> torch.dtype:
    """PETSc's scalar type as a torch dtype."""
    return torch.from_numpy(np.empty(0, dtype=PETSc.ScalarType)).dtype


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
