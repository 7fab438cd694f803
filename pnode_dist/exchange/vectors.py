"""Gather of a partitioned vector on every rank, and its transpose."""

from __future__ import annotations

import math
from functools import partial

import torch
from mpi4py import MPI

from pnode_dist.distributed.buffers import bytes_of
from pnode_dist.exchange.compiled import exchange, is_compiled, number_of
from pnode_dist.exchange.linear_map import linear_map
from pnode_dist.partition.dense import DensePartition
from pnode_dist.system.torch_internals import evaluated_while_tracing


def gather_vector(x: torch.Tensor, partition: DensePartition) -> torch.Tensor:
    """Return the whole vector on every rank, `[..., local_size] -> [..., size]`. Collective on the partition.

    Its adjoint is `reduce_vector`.
    """
    if is_compiled():
        return exchange(x, *_registered("gather_vector", tuple(x.shape), partition))
    return linear_map(x, partial(_gathered, partition=partition), partial(_reduced, partition=partition))


def reduce_vector(x: torch.Tensor, partition: DensePartition) -> torch.Tensor:
    """Return this rank's part of the sum of all ranks' vectors, `[..., size] -> [..., local_size]`. Collective.

    Its adjoint is `gather_vector`.
    """
    if is_compiled():
        return exchange(x, *_registered("reduce_vector", tuple(x.shape), partition))
    return linear_map(x, partial(_reduced, partition=partition), partial(_gathered, partition=partition))


@evaluated_while_tracing
def _registered(name: str, shape: tuple[int, ...], partition: DensePartition) -> tuple[int, tuple[int, ...]]:
    """Return the number of the map of this name, and the shape of its result."""
    gathers = name == "gather_vector"
    maps = (_gathered, _reduced) if gathers else (_reduced, _gathered)
    image = partition.global_shape if gathers else partition.local_shape
    return number_of(partition, name, *maps), (*shape[:-1], *image)


def _gathered(x: torch.Tensor, partition: DensePartition) -> torch.Tensor:
    # With the vector's axis first, the ranks' parts are consecutive in memory.
    part = x.movedim(-1, 0).cpu().contiguous()
    whole = part.new_empty((partition.size, *part.shape[1:]))
    row = math.prod(part.shape[1:])
    counts = [count * row * x.element_size() for count in partition.counts]
    partition.comm.Allgatherv([bytes_of(part), MPI.BYTE], [bytes_of(whole), counts, MPI.BYTE])
    return whole.movedim(0, -1).contiguous().to(x.device)


def _reduced(x: torch.Tensor, partition: DensePartition) -> torch.Tensor:
    whole = x.detach().movedim(-1, 0).cpu().contiguous()
    row = math.prod(whole.shape[1:])
    part = whole.new_empty((*partition.local_shape, *whole.shape[1:]))
    counts = [count * row for count in partition.counts]
    partition.comm.Reduce_scatter(whole.numpy().reshape(-1), part.numpy().reshape(-1), counts, MPI.SUM)
    return part.movedim(0, -1).contiguous().to(x.device)
