"""Differentiable communication between the ranks of one state.

The convention throughout: every rank differentiates its own share of the loss, and the objective is the sum of the
shares. The adjoint of an exchange is then its transpose as a linear map over all ranks, and calling `backward()` is
as collective as the forward call was.

The exchanges may be differentiated in reverse and in forward mode (torch.autograd.forward_ad, torch.func.vjp and jvp)
and in any nesting of the two. A tangent is exchanged like the value that carries it: forward mode is collective too.
What is differentiated on one rank is to be differentiated on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from pnode_dist.buffers import bytes_of
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition import protocol
from pnode_dist.partition.dense import DensePartition
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.protocol import Partition

Width = int | tuple[int, int]

Map = Callable[[torch.Tensor], torch.Tensor]

_TO_LOWER, _TO_UPPER = 1, 2
_AXES = (-3, -2)


class _Linear(torch.autograd.Function):
    """A linear map over all ranks, which with its transpose is all that any derivative of it needs.

    Both are given plain tensors, with any number of leading axes.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As inherited, without inspecting `forward` for default arguments, which takes as long as a small halo."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]

    @staticmethod
    def forward(x: torch.Tensor, forward: Map, transpose: Map) -> torch.Tensor:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.forward, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return _linear(cotangents[0], ctx.transpose, ctx.forward), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _linear(tangents[0], ctx.forward, ctx.transpose)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: torch.Tensor, forward: Map, transpose: Map) -> Any:
        return _linear(x.movedim(in_dims[0], 0), forward, transpose), 0


def _linear(x: torch.Tensor, forward: Map, transpose: Map) -> torch.Tensor:
    image: torch.Tensor = _Linear.apply(x, forward, transpose)
    return image


def halo(x: torch.Tensor, partition: GridPartition, width: Width | None = None) -> torch.Tensor:
    """The rank's block with the neighbouring points around it. Collective on the partition's communicator.

    `x` is `[..., ny_local, nx_local, channels]` of any floating type and any number of channels; the result
    `[..., ny_local + 2 wy, nx_local + 2 wx, channels]`, with the boundary rules of the partition beyond the domain.
    `width` is one number or `(wy, wx)`, by default the partition's stencil width. Columns are exchanged first and
    rows, with the columns' ghosts, second: corners come along, and no rank sends more than four messages.
    Where the partition has a value for a boundary, it is what lies beyond; in corners the rule of y comes last.
    Raises `ConfigurationError` when the width exceeds the smallest block, less one point where the field is reflected.
    """
    wy, wx = _widths(partition, width)
    if x.dim() < 3 or tuple(x.shape[-3:-1]) != partition.local_shape[:2]:
        raise ValueError(
            f"halo: got shape {tuple(x.shape)}, this rank owns [..., {partition.local_shape[0]}, "
            f"{partition.local_shape[1]}, channels]"
        )
    if wy == wx == 0:
        return x
    padded = partial(_padded, partition=partition, width=(wy, wx))
    folded = partial(_folded, partition=partition, width=(wy, wx))
    image = _linear(x, padded, folded)
    if all(isinstance(rule, str) for rule in partition.boundary):
        return image
    fixed, values = _beyond(partition, (wy, wx), x.dtype)
    return torch.where(fixed, values, image)


def _widths(partition: GridPartition, width: Width | None) -> tuple[int, int]:
    if width is None:
        width = partition.stencil_width
    wy, wx = (width, width) if isinstance(width, int) else width
    smallest = (_widest(partition, 0), _widest(partition, 1))
    if wy < 0 or wx < 0 or wy > smallest[0] or wx > smallest[1]:
        raise ConfigurationError(
            f"halo: width = {(wy, wx)}: must be between 0 and what the smallest block of any rank has, {smallest}"
        )
    return wy, wx


def _widest(partition: GridPartition, axis: int) -> int:
    """The widest halo that the smallest block can give. A mirror needs the points beside the edge as well."""
    return partition.smallest_block(axis) - (partition.boundary[axis] == "reflect")


def _beyond(partition: GridPartition, width: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Which points of a padded block have fixed values, and these values, both `[ny + 2 wy, nx + 2 wx, 1]`."""
    key = (width, dtype)
    if key not in partition.beyond:
        shape = [n + 2 * w for n, w in zip(partition.local_shape[:2], width, strict=True)]
        fixed, values = torch.zeros(*shape, 1, dtype=torch.bool), torch.zeros(*shape, 1, dtype=dtype)
        # Columns first, as they are exchanged: what lies beyond in y and in x follows the rule of y.
        for axis in (1, 0):
            rule, w, n = partition.boundary[axis], width[axis], shape[axis] - 2 * width[axis]
            value = 0.0 if rule == "zero" else rule
            if isinstance(value, str):
                continue
            for start, step in ((0, -1), (n + w, 1)):
                if partition.neighbour(axis, step) == MPI.PROC_NULL:
                    _slab(fixed, axis, start, w, slice(None)).fill_(True)
                    _slab(values, axis, start, w, slice(None)).fill_(value)
        partition.beyond[key] = fixed, values
    return partition.beyond[key]


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
        rule = partition.boundary[axis]
        places = ((0, from_lower, w, w + 1), (n + w, from_upper, n + w - 1, n - 1))
        for ghost_start, arrived, edge, mirrored in places:
            ghost = _slab(padded, axis, ghost_start, w, rows)
            if arrived is not None:
                ghost.copy_(arrived)
            elif rule == "replicate":
                ghost.copy_(_slab(padded, axis, edge, 1, rows))
            elif rule == "reflect":
                ghost.copy_(_slab(padded, axis, mirrored, w, rows).flip(_AXES[axis]))
            else:
                ghost.zero_()
    return padded


def _folded(cotangent: torch.Tensor, partition: GridPartition, width: tuple[int, int]) -> torch.Tensor:
    """The transpose of `_padded`: what the ghosts received goes back to where it came from, and is added there."""
    wy, wx = width
    ny, nx = cotangent.shape[-3] - 2 * wy, cotangent.shape[-2] - 2 * wx
    folded = cotangent.detach().clone(memory_format=torch.contiguous_format)
    rows = slice(wy, wy + ny)
    for axis, w, n in ((0, wy, ny), (1, wx, nx)):
        if w == 0:
            continue
        low_ghost, high_ghost = _slab(folded, axis, 0, w, rows), _slab(folded, axis, n + w, w, rows)
        from_lower, from_upper = _swap(partition, axis, low_ghost, high_ghost)
        rule = partition.boundary[axis]
        places = ((from_lower, w, low_ghost, w, w + 1), (from_upper, n, high_ghost, n + w - 1, n - 1))
        for arrived, inner_start, ghost, edge, mirrored in places:
            if arrived is not None:
                _slab(folded, axis, inner_start, w, rows).add_(arrived)
            elif rule == "replicate":
                _slab(folded, axis, edge, 1, rows).add_(ghost.sum(dim=_AXES[axis], keepdim=True))
            elif rule == "reflect":
                _slab(folded, axis, mirrored, w, rows).add_(ghost.flip(_AXES[axis]))
    return folded[..., rows, wx : wx + nx, :].contiguous()


def global_sum(x: torch.Tensor, comm: MPI.Comm) -> torch.Tensor:
    """The sum of `x` over the ranks of `comm`, on every rank. Collective on `comm`.

    Its adjoint is the sum of all ranks' cotangents. A loss made of a global sum is therefore to be weighted so that
    the ranks' shares add up to it once: `global_sum(x, comm) / comm.size`, or on one rank only.
    """
    add = partial(_summed, comm=comm)
    return _linear(x, add, add)


def _summed(x: torch.Tensor, comm: MPI.Comm) -> torch.Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    comm.Allreduce(MPI.IN_PLACE, total.numpy(), MPI.SUM)
    return total


def gather_vector(x: torch.Tensor, partition: DensePartition) -> torch.Tensor:
    """All of a partitioned vector, `[..., local_size] -> [..., size]`, on every rank. Collective on the partition's
    communicator.

    Its adjoint is `reduce_vector`.
    """
    return _linear(x, partial(_gathered, partition=partition), partial(_reduced, partition=partition))


def reduce_vector(x: torch.Tensor, partition: DensePartition) -> torch.Tensor:
    """This rank's part of the sum of the ranks' vectors, `[..., size] -> [..., local_size]`. Collective on the
    partition's communicator.

    Its adjoint is `gather_vector`.
    """
    return _linear(x, partial(_reduced, partition=partition), partial(_gathered, partition=partition))


def _gathered(x: torch.Tensor, partition: DensePartition) -> torch.Tensor:
    # The ranks' parts follow one another in memory if the vector's axis comes first.
    part = x.movedim(-1, 0).contiguous()
    whole = x.new_empty((partition.size, *part.shape[1:]))
    row = math.prod(part.shape[1:])
    counts = [count * row * x.element_size() for count in partition.counts]
    partition.comm.Allgatherv([bytes_of(part), MPI.BYTE], [bytes_of(whole), counts, MPI.BYTE])
    return whole.movedim(0, -1).contiguous()


def _reduced(x: torch.Tensor, partition: DensePartition) -> torch.Tensor:
    whole = x.detach().movedim(-1, 0).contiguous()
    row = math.prod(whole.shape[1:])
    part = x.new_empty((*partition.local_shape, *whole.shape[1:]))
    counts = [count * row for count in partition.counts]
    partition.comm.Reduce_scatter(whole.numpy().reshape(-1), part.numpy().reshape(-1), counts, MPI.SUM)
    return part.movedim(0, -1).contiguous()


def scatter(x: torch.Tensor | None, partition: Partition, root: int = 0) -> torch.Tensor:
    """Each rank's block of the global tensor that `root` holds. Collective on the partition's communicator.

    `x` is `[..., *global_shape]` on `root`; its values are ignored elsewhere. The adjoint gathers the cotangents on
    `root`. Under torch.func the other ranks pass a tensor that is differentiated like root's, if only an empty one.
    """
    local: torch.Tensor = _Scatter.apply(_source(x, partition, root), partition, root)  # type: ignore[no-untyped-call]
    return local


def _source(x: torch.Tensor | None, partition: Partition, root: int) -> torch.Tensor:
    """What is scattered: `x` on `root`; elsewhere an empty tensor, differentiated as `x` is on `root`.

    The other ranks need a node of their own in the graph, so that derivatives find them taking part.
    """
    at_root = partition.comm.rank == root
    traits = (x.dtype, x.requires_grad, _has_tangent(x)) if at_root and x is not None else None
    traits = partition.comm.bcast(traits, root=root)
    if traits is None:
        raise ValueError(f"scatter: rank {root}, the root, gave no tensor")
    if at_root and x is not None:
        return x
    dtype, differentiable, dual = traits
    if not (differentiable or dual):
        return torch.empty(0, dtype=dtype)
    source = torch.empty(0) if x is None else x.reshape(-1)[:0].to(dtype)
    if differentiable and not source.requires_grad:
        source = torch.empty(0, dtype=dtype, requires_grad=True)
    if dual and not _has_tangent(source):
        source = forward_ad.make_dual(source, torch.empty(0, dtype=dtype))  # type: ignore[no-untyped-call]
    return source


def _has_tangent(x: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, partition: Partition, root: int) -> torch.Tensor:
        return protocol.scatter(x, partition, root)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.partition, ctx.root = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return gather(cotangents[0], ctx.partition, ctx.root), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return scatter(tangents[0], ctx.partition, ctx.root)


def gather(x: torch.Tensor, partition: Partition, root: int = 0) -> torch.Tensor:
    """The global tensor `[..., *global_shape]` on `root`, an empty tensor elsewhere. Collective on the partition.

    The adjoint scatters root's cotangent. The other ranks take part in it when their share of the loss contains the
    empty tensor, for instance its sum, which is zero.
    """
    whole: torch.Tensor = _Gather.apply(x, partition, root)  # type: ignore[no-untyped-call]
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, partition: Partition, root: int) -> torch.Tensor:
        whole = protocol.gather(x, partition, root)
        return x.new_empty(0) if whole is None else whole

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.partition, ctx.root = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return scatter(cotangents[0], ctx.partition, ctx.root), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return gather(tangents[0], ctx.partition, ctx.root)
