"""Differentiable communication between the ranks of one state.

The convention throughout: every rank differentiates its own share of the loss, and the objective is the sum of the
shares. The adjoint of an exchange is then its transpose as a linear map over all ranks, and calling `backward()` is
as collective as the forward call was.
"""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI

from pnode_dist.buffers import bytes_of
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition import protocol
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.protocol import Partition

Width = int | tuple[int, int]

_TO_LOWER, _TO_UPPER = 1, 2


def halo(x: torch.Tensor, partition: GridPartition, width: Width | None = None) -> torch.Tensor:
    """The rank's block with the neighbouring points around it. Collective on the partition's communicator.

    `x` is `[..., ny_local, nx_local, channels]` of any floating type and any number of channels; the result
    `[..., ny_local + 2 wy, nx_local + 2 wx, channels]`, with the boundary rules of the partition beyond the domain.
    `width` is one number or `(wy, wx)`, by default the partition's stencil width. Columns are exchanged first and
    rows, with the columns' ghosts, second: corners come along, and no rank sends more than four messages.
    Raises `ConfigurationError` when the width exceeds the smallest block.
    """
    wy, wx = _widths(partition, width)
    if x.dim() < 3 or tuple(x.shape[-3:-1]) != partition.local_shape[:2]:
        raise ValueError(
            f"halo: got shape {tuple(x.shape)}, this rank owns [..., {partition.local_shape[0]}, "
            f"{partition.local_shape[1]}, channels]"
        )
    if wy == wx == 0:
        return x
    padded: torch.Tensor = _Halo.apply(x, partition, (wy, wx))  # type: ignore[no-untyped-call]
    return padded


def _widths(partition: GridPartition, width: Width | None) -> tuple[int, int]:
    if width is None:
        width = partition.stencil_width
    wy, wx = (width, width) if isinstance(width, int) else width
    smallest = (partition.smallest_block(0), partition.smallest_block(1))
    if wy < 0 or wx < 0 or wy > smallest[0] or wx > smallest[1]:
        raise ConfigurationError(
            f"halo: width = {(wy, wx)}: must be between 0 and the smallest block of any rank, {smallest}"
        )
    return wy, wx


def _slab(padded: torch.Tensor, axis: int, start: int, length: int, columns: slice) -> torch.Tensor:
    """`length` rows (axis 0, over all columns) or columns (axis 1, over the rows `columns`) of a padded block."""
    if axis == 0:
        return padded[..., start : start + length, :, :]
    return padded[..., columns, start : start + length, :]


def _swap(
    partition: GridPartition, axis: int, to_lower: torch.Tensor, to_upper: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Exchange slabs with both neighbours along `axis`: what came (from the lower, from the upper), None at an edge."""
    lower, upper = partition.neighbour(axis, -1), partition.neighbour(axis, 1)
    if lower == upper == partition.comm.rank:
        return to_upper, to_lower
    from_lower = from_upper = None
    requests = []
    if lower != MPI.PROC_NULL:
        from_lower = torch.empty(to_upper.shape, dtype=to_upper.dtype)
        requests.append(partition.comm.Irecv([bytes_of(from_lower), MPI.BYTE], lower, _TO_UPPER))
    if upper != MPI.PROC_NULL:
        from_upper = torch.empty(to_lower.shape, dtype=to_lower.dtype)
        requests.append(partition.comm.Irecv([bytes_of(from_upper), MPI.BYTE], upper, _TO_LOWER))
    if lower != MPI.PROC_NULL:
        requests.append(partition.comm.Isend([bytes_of(to_lower.contiguous()), MPI.BYTE], lower, _TO_LOWER))
    if upper != MPI.PROC_NULL:
        requests.append(partition.comm.Isend([bytes_of(to_upper.contiguous()), MPI.BYTE], upper, _TO_UPPER))
    MPI.Request.Waitall(requests)
    return from_lower, from_upper


def _padded(x: torch.Tensor, partition: GridPartition, width: tuple[int, int]) -> torch.Tensor:
    wy, wx = width
    ny, nx, channels = x.shape[-3:]
    padded = x.new_empty((*x.shape[:-3], ny + 2 * wy, nx + 2 * wx, channels))
    rows = slice(wy, wy + ny)
    padded[..., rows, wx : wx + nx, :] = x
    for axis, w, n in ((1, wx, nx), (0, wy, ny)):
        if w == 0:
            continue
        low, high = _slab(padded, axis, w, w, rows), _slab(padded, axis, n, w, rows)
        from_lower, from_upper = _swap(partition, axis, low, high)
        replicate = partition.boundary[axis] == "replicate"
        for ghost_start, arrived, edge in ((0, from_lower, w), (n + w, from_upper, n + w - 1)):
            ghost = _slab(padded, axis, ghost_start, w, rows)
            if arrived is not None:
                ghost.copy_(arrived)
            elif replicate:
                ghost.copy_(_slab(padded, axis, edge, 1, rows))
            else:
                ghost.zero_()
    return padded


def _folded(cotangent: torch.Tensor, partition: GridPartition, width: tuple[int, int]) -> torch.Tensor:
    """The transpose of `_padded`: what the ghosts received goes back to where it came from, and is added there."""
    wy, wx = width
    ny, nx = cotangent.shape[-3] - 2 * wy, cotangent.shape[-2] - 2 * wx
    folded = cotangent.detach().clone(memory_format=torch.contiguous_format)
    rows = slice(wy, wy + ny)
    axis_length = -3, -2
    for axis, w, n in ((0, wy, ny), (1, wx, nx)):
        if w == 0:
            continue
        low_ghost, high_ghost = _slab(folded, axis, 0, w, rows), _slab(folded, axis, n + w, w, rows)
        from_lower, from_upper = _swap(partition, axis, low_ghost, high_ghost)
        replicate = partition.boundary[axis] == "replicate"
        edges = ((from_lower, w, low_ghost, w), (from_upper, n, high_ghost, n + w - 1))
        for arrived, inner_start, ghost, edge in edges:
            if arrived is not None:
                _slab(folded, axis, inner_start, w, rows).add_(arrived)
            elif replicate:
                _slab(folded, axis, edge, 1, rows).add_(ghost.sum(dim=axis_length[axis], keepdim=True))
    return folded[..., rows, wx : wx + nx, :].contiguous()


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, partition: GridPartition, width: tuple[int, int]) -> torch.Tensor:
        ctx.partition, ctx.width = partition, width
        return _padded(x, partition, width)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return _HaloAdjoint.apply(cotangents[0], ctx.partition, ctx.width), None, None  # type: ignore[no-untyped-call]


class _HaloAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cotangent: torch.Tensor, partition: GridPartition, width: tuple[int, int]) -> torch.Tensor:
        ctx.partition, ctx.width = partition, width
        return _folded(cotangent, partition, width)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        return _Halo.apply(tangents[0], ctx.partition, ctx.width), None, None  # type: ignore[no-untyped-call]


def global_sum(x: torch.Tensor, comm: MPI.Comm) -> torch.Tensor:
    """The sum of `x` over the ranks of `comm`, on every rank. Collective on `comm`.

    Its adjoint is the sum of all ranks' cotangents. A loss made of a global sum is therefore to be weighted so that
    the ranks' shares add up to it once: `global_sum(x, comm) / comm.size`, or on one rank only.
    """
    total: torch.Tensor = _GlobalSum.apply(x, comm)  # type: ignore[no-untyped-call]
    return total


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: MPI.Comm) -> torch.Tensor:
        ctx.comm = comm
        total = x.detach().clone(memory_format=torch.contiguous_format)
        comm.Allreduce(MPI.IN_PLACE, total.numpy(), MPI.SUM)
        return total

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return global_sum(cotangents[0], ctx.comm), None


def scatter(x: torch.Tensor | None, partition: Partition, root: int = 0) -> torch.Tensor:
    """Each rank's block of the global tensor that `root` holds. Collective on the partition's communicator.

    `x` is `[..., *global_shape]` on `root` and ignored elsewhere. The adjoint gathers the cotangents on `root`.
    """
    comm = partition.comm
    at_root = comm.rank == root
    differentiable = comm.bcast(bool(at_root and x is not None and x.requires_grad), root=root)
    # The other ranks need a node of their own in the graph, so that their backward pass takes part in the gather.
    source = x if at_root and x is not None else torch.empty(0, requires_grad=differentiable)
    local: torch.Tensor = _Scatter.apply(source, partition, root)  # type: ignore[no-untyped-call]
    return local


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, partition: Partition, root: int) -> torch.Tensor:
        ctx.partition, ctx.root = partition, root
        ctx.dtype = x.dtype
        return protocol.scatter(x, partition, root)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        whole = protocol.gather(cotangents[0], ctx.partition, ctx.root)
        return (torch.empty(0) if whole is None else whole), None, None


def gather(x: torch.Tensor, partition: Partition, root: int = 0) -> torch.Tensor:
    """The global tensor `[..., *global_shape]` on `root`, an empty tensor elsewhere. Collective on the partition.

    The adjoint scatters root's cotangent. The other ranks take part in it when their share of the loss contains the
    empty tensor, for instance its sum, which is zero.
    """
    whole: torch.Tensor = _Gather.apply(x, partition, root)  # type: ignore[no-untyped-call]
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, partition: Partition, root: int) -> torch.Tensor:
        ctx.partition, ctx.root = partition, root
        whole = protocol.gather(x, partition, root)
        return x.new_empty(0) if whole is None else whole

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return protocol.scatter(cotangents[0], ctx.partition, ctx.root), None, None
