"""Parameter gradients over the mesh: summed over state ranks, averaged over data replicas.

Every rank differentiates its own share of the loss, so a replica's gradient is the sum of its ranks' gradients, and
the gradient of the mean loss over replicas is that sum divided by their number. torch's DistributedDataParallel does
the bucketing; the communication hook below replaces its mean over all ranks by this rule.
"""

import hashlib
import warnings

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pnode_dist.mesh import Mesh


def _sum_over_state_mean_over_data(
    mesh: Mesh,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    buffer = bucket.buffer()
    work = dist.all_reduce(buffer, group=mesh.world_group, async_op=True)
    assert work is not None
    replicas = mesh.data_replicas

    def divide(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        total = future.value()[0]
        return total if replicas == 1 else total.div_(replicas)

    summed: torch.futures.Future[torch.Tensor] = work.get_future().then(divide)
    return summed


def broadcast_parameters(module: nn.Module, mesh: Mesh) -> None:
    """Give every rank rank 0's parameters. Buffers stay as they are: they may hold a rank's own part of a field.

    Raises `ValueError` on all ranks if the ranks' parameters differ in name, shape or type. Collective on the world.
    """
    described = [(name, tuple(value.shape), str(value.dtype)) for name, value in module.named_parameters()]
    digest = hashlib.sha256(repr(described).encode()).digest()
    differs = torch.tensor([int(mesh.broadcast_object(digest) != digest)])
    if mesh.max(differs).item():
        raise ValueError("the ranks built models whose parameters differ in name, shape or type")
    with torch.no_grad():
        for value in module.parameters():
            dist.broadcast(value.data, src=0, group=mesh.world_group)


def parallel(module: nn.Module, mesh: Mesh) -> DistributedDataParallel:
    """`module` under DistributedDataParallel over the whole mesh, with its parameters taken from rank 0.

    After `backward()` of each rank's share of the loss every parameter's `.grad` holds, bit for bit the same on all
    ranks, the sum over state ranks and mean over data replicas. Buffers are never communicated.
    Raises `ValueError` when no parameter requires a gradient. Collective on the world.
    """
    if not any(value.requires_grad for value in module.parameters()):
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient: there is nothing to sum")
    broadcast_parameters(module, mesh)
    with warnings.catch_warnings():
        # Its successor would synchronise the buffers once, and they may hold a rank's own part of a field.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped = DistributedDataParallel(
            module,
            process_group=mesh.world_group,
            broadcast_buffers=False,
            init_sync=False,
            gradient_as_bucket_view=True,
        )
    wrapped.register_comm_hook(mesh, _sum_over_state_mean_over_data)
    return wrapped


def sum_gradients(tensors: list[torch.Tensor], comm: MPI.Comm) -> None:
    """Sum each tensor over the ranks of `comm`, in place. Collective on `comm`."""
    for value in tensors:
        total = value.contiguous()
        comm.Allreduce(MPI.IN_PLACE, total.numpy(), MPI.SUM)
        if total.data_ptr() != value.data_ptr():
            value.copy_(total)
