"""Sums over ranks."""

from __future__ import annotations

from functools import partial

import torch
from mpi4py import MPI

from pnode_dist.distributed.mesh import Extent, Mesh
from pnode_dist.exchange.compiled import exchange, is_compiled, number_of
from pnode_dist.exchange.linear_map import linear_map
from pnode_dist.system.torch_internals import evaluated_while_tracing


def global_sum(x: torch.Tensor, comm: MPI.Comm) -> torch.Tensor:
    """Return the sum of `x` over the ranks of `comm`, on every rank. Collective on `comm`.

    Its adjoint is the sum of all ranks' cotangents. Weight a loss that contains a global sum, so that the ranks' shares
    add up to it once: `global_sum(x, comm) / comm.size`, or on one rank only.
    """
    if is_compiled():
        return exchange(x, _registered_sum(comm), tuple(x.shape))
    add = partial(_summed, comm=comm)
    return linear_map(x, add, add)


def mesh_sum(x: torch.Tensor, mesh: Mesh, over: Extent = "world") -> torch.Tensor:
    """Return `mesh.sum(x, over)`, differentiable. Collective on `over`.

    Its adjoint is the sum of those ranks' cotangents.
    With data replicas the objective is the mean of theirs. A sum over the world couples them, so every rank must
    differentiate it. See `global_sum`.
    """
    if is_compiled():
        return exchange(x, _registered_mesh_sum(mesh, over), tuple(x.shape))
    add = partial(mesh.sum, over=over)
    return linear_map(x, add, add)


@evaluated_while_tracing
def _registered_sum(comm: MPI.Comm) -> int:
    return number_of(comm, "global_sum", _summed, _summed)


@evaluated_while_tracing
def _registered_mesh_sum(mesh: Mesh, over: Extent) -> int:
    add = partial(_mesh_summed, over=over)
    return number_of(mesh, ("mesh_sum", over), add, add)


def _mesh_summed(x: torch.Tensor, mesh: Mesh, over: Extent) -> torch.Tensor:
    return mesh.sum(x, over)


def _summed(x: torch.Tensor, comm: MPI.Comm) -> torch.Tensor:
    total = x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    comm.Allreduce(MPI.IN_PLACE, total.numpy(), MPI.SUM)
    return total.to(x.device)
