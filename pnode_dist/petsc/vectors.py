"""PETSc Vecs whose entries are seen as tensors, in the host's memory or on a device."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.petsc.calls import scalars_at

HOST = torch.device("cpu")


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
    buffer = scalars_at(address, size)
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
