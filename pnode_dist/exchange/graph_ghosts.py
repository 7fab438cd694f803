"""The ghosts of a rank's part of a graph: nodes of other ranks that are sources of its edges."""

from __future__ import annotations

from functools import partial

import torch
from mpi4py import MPI

from pnode_dist.distributed.buffers import bytes_of
from pnode_dist.exchange.compiled import exchange, is_compiled, number_of
from pnode_dist.exchange.linear_map import linear_map
from pnode_dist.partition.graph import GraphPartition
from pnode_dist.system.torch_internals import evaluated_while_tracing

_NODES = -2


def with_ghosts(x: torch.Tensor, partition: GraphPartition) -> torch.Tensor:
    """Return the rank's nodes followed by its ghosts. Collective on the partition's communicator.

    Maps `[..., local_nodes, features]` to `[..., local_nodes + ghosts, features]`, for any floating type and any number
    of features. Each rank sends one message, with only the nodes needed, to each rank that has ghosts of it. The
    adjoint sends the cotangents of the ghosts back and adds them in the order of ranks, so its bits do not depend on
    the order of arrival. Raises `ValueError` for another number of nodes.
    """
    if is_compiled():
        number, shape = _registered(tuple(x.shape), partition)
        return x if number is None else exchange(x, number, shape)
    _check(tuple(x.shape), partition)
    if not (partition.sent or partition.received):
        return x
    return linear_map(x, partial(_extended, partition=partition), partial(_folded, partition=partition))


def _check(shape: tuple[int, ...], partition: GraphPartition) -> None:
    if len(shape) < 2 or shape[_NODES] != partition.local_shape[0]:
        raise ValueError(f"with_ghosts: got shape {shape}, this rank owns [..., {partition.local_shape[0]}, features]")


@evaluated_while_tracing
def _registered(shape: tuple[int, ...], partition: GraphPartition) -> tuple[int | None, tuple[int, ...]]:
    """Return the number of the map and the shape of its result. No number without neighbours."""
    _check(shape, partition)
    if not (partition.sent or partition.received):
        return None, shape
    number = number_of(partition, "with_ghosts", _extended, _folded)
    return number, (*shape[:_NODES], shape[_NODES] + len(partition.ghosts), shape[-1])


def _extended(x: torch.Tensor, partition: GraphPartition) -> torch.Tensor:
    nodes = x.shape[_NODES]
    extended = x.new_empty((*x.shape[:_NODES], nodes + len(partition.ghosts), x.shape[-1]))
    extended[..., :nodes, :] = x
    places = [extended[..., nodes + ghosts.start : nodes + ghosts.stop, :] for ghosts in partition.received]
    arriving = [torch.empty(place.shape, dtype=x.dtype) for place in places]
    requests = [
        partition.comm.Irecv([bytes_of(buffer), MPI.BYTE], ghosts.rank)
        for ghosts, buffer in zip(partition.received, arriving, strict=True)
    ]
    for part in partition.sent:
        seen = x.index_select(_NODES, part.nodes.to(x.device)).cpu()
        requests.append(partition.comm.Isend([bytes_of(seen), MPI.BYTE], part.rank))
    MPI.Request.Waitall(requests)
    for place, buffer in zip(places, arriving, strict=True):
        place.copy_(buffer)
    return extended


def _folded(cotangent: torch.Tensor, partition: GraphPartition) -> torch.Tensor:
    """Apply the transpose of `_extended`: add the cotangents of ghosts to those of their owners."""
    cotangent = cotangent.detach()
    nodes = cotangent.shape[_NODES] - len(partition.ghosts)
    folded = cotangent[..., :nodes, :].clone(memory_format=torch.contiguous_format)
    arriving = [
        torch.empty((*cotangent.shape[:_NODES], len(part.nodes), cotangent.shape[-1]), dtype=cotangent.dtype)
        for part in partition.sent
    ]
    requests = [
        partition.comm.Irecv([bytes_of(buffer), MPI.BYTE], part.rank)
        for part, buffer in zip(partition.sent, arriving, strict=True)
    ]
    for ghosts in partition.received:
        block = cotangent[..., nodes + ghosts.start : nodes + ghosts.stop, :].cpu().contiguous()
        requests.append(partition.comm.Isend([bytes_of(block), MPI.BYTE], ghosts.rank))
    MPI.Request.Waitall(requests)
    for part, buffer in zip(partition.sent, arriving, strict=True):
        folded.index_add_(_NODES, part.nodes.to(folded.device), buffer.to(folded.device))
    return folded
