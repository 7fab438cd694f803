"""PETSc Vecs as tensors, in the host's memory or on a device, without copies."""

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
    """Return the device of PETSc's Vecs for tensors on `device`: the same if PETSc supports it, else the host.

    Only `cuda` is supported, for a PETSc configured with it. Written after PETSc's manual, and untested on hardware.
    """
    there = device.type == "cuda" and PETSc.Sys.hasExternalPackage("cuda")
    return device if there else HOST


def create_vec(comm: MPI.Comm, local_size: int, device: torch.device = HOST) -> PETSc.Vec:
    """Create an MPI Vec with `local_size` entries on this rank, on a `vec_device`. Collective on `comm`."""
    if device is HOST:
        return PETSc.Vec().createMPI((local_size, None), comm=comm)
    vec = PETSc.Vec().create(comm=comm)
    vec.setSizes((local_size, None))
    vec.setType(PETSc.Vec.Type.CUDA)
    vec.zeroEntries()
    return vec


def view(vec: PETSc.Vec, shape: tuple[int, ...], device: torch.device = HOST) -> torch.Tensor:
    """Return this rank's entries of `vec` as a tensor of `shape`, in PETSc's scalar type, without a copy.

    The view keeps the Vec's memory alive. Call `wrote` after writing through it.
    """
    if device is not HOST:
        return _exchanged(vec).view(shape)
    # Vecs in callbacks are locked for reading, and array_w refuses them. Callers write only where PETSc allows it.
    address = vec.array_r.__array_interface__["data"][0]
    size = vec.getLocalSize()
    if size == 0:
        return torch.empty(shape, dtype=scalar_dtype())
    buffer = scalars_at(address, size)
    # Hold a reference to the Vec: a view may outlive the solver, for instance if f keeps it.
    buffer.vec = copy.copy(vec)
    return torch.frombuffer(buffer, dtype=scalar_dtype()).view(shape)


def _exchanged(vec: PETSc.Vec) -> torch.Tensor:
    """Return this rank's entries of a Vec on any device by DLPack. The tensor keeps the Vec alive."""
    try:
        capsule = vec.toDLPack("rw")
    except PETSc.Error:
        # The Vec is locked for reading, in a callback.
        capsule = vec.toDLPack("r")
    return torch.utils.dlpack.from_dlpack(capsule)


def wrote(vec: PETSc.Vec, device: torch.device = HOST) -> None:
    """Notify PETSc of a write through a view: it caches norms, and on a device the newer of two memories."""
    if device is not HOST:
        vec.toDLPack("w")
    vec.stateIncrease()


def fill(vec: PETSc.Vec, values: torch.Tensor, device: torch.device = HOST) -> None:
    """Copy a flat tensor into this rank's entries of a Vec on its `vec_device`."""
    view(vec, (values.numel(),), device).copy_(values)
    wrote(vec, device)


@cache
def scalar_dtype() -> torch.dtype:
    """Return PETSc's scalar type as a torch dtype."""
    return torch.from_numpy(np.empty(0, dtype=PETSc.ScalarType)).dtype
