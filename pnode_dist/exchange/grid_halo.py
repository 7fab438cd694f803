"""The halo of a block of a grid: the neighbouring points that a stencil sees.

What surrounds a block are points of neighbouring ranks and points beyond the edges of the domain, which follow a
boundary rule. `halo` brings both; `neighbour_halo` brings the first, and communicates; `pad_edges` the second, and does
not. All three fill the sides of one axis after the other, the last axis first and each over what the previous ones
brought, so that corners come along and no rank sends more than two messages an axis. What other ranks send comes first;
what follows from points that are here by then is not sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from mpi4py import MPI

from pnode_dist.distributed.buffers import bytes_of
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.linear_map import linear_map
from pnode_dist.partition.grid import GridPartition, Rule

Width = int | Sequence[int | tuple[int, int]]
"""How many points: one number, or for each axis a number or a pair of numbers, below and above."""

_TO_LOWER, _TO_UPPER = 1, 2


def halo(x: torch.Tensor, partition: GridPartition, width: Width | None = None) -> torch.Tensor:
    """The rank's block with the neighbouring points around it. Collective on the partition's communicator.

    `x` is `[..., *local, channels]` of any floating type and any number of channels; the result is as many points
    wider on each side as `width` says, by default the partition's stencil width, with the boundary rules of the
    partition beyond the domain. Where the partition has a value for a boundary, it is what lies beyond; in corners the
    rule of the first axis comes last.
    Raises `ConfigurationError` when the width exceeds the smallest block, less one point where the field is reflected.
    """
    rim = _rim("halo", partition, width)
    _check_block("halo", x, partition, larger=False)
    return _surrounded(x, rim)


def neighbour_halo(x: torch.Tensor, partition: GridPartition, width: Width | None = None) -> torch.Tensor:
    """`halo` towards neighbouring ranks only: nothing is put beyond the edges of the domain. Collective on the
    partition's communicator.

    A periodic axis has no edge: a rank that is alone along it is its own neighbour. `pad_edges` adds what is missing:
    `pad_edges(neighbour_halo(x, partition, width), partition, width)` is `halo(x, partition, width)`.
    Raises `ConfigurationError` when the width exceeds the smallest block.
    """
    rim = _rim("neighbour_halo", partition, width)
    _check_block("neighbour_halo", x, partition, larger=False)
    return _surrounded(x, rim)


def pad_edges(x: torch.Tensor, partition: GridPartition, width: Width | None = None) -> torch.Tensor:
    """The block with the boundary rules of the partition beyond the domain, and nothing towards neighbouring ranks.
    Not collective, and neither are its derivatives.

    `x` is `[..., *block, channels]`, the rank's own points and as many of its neighbours' around them as one likes.
    Raises `ConfigurationError` when the width exceeds the smallest block, less one point where the field is reflected.
    """
    rim = _rim("pad_edges", partition, width)
    _check_block("pad_edges", x, partition, larger=True)
    return _surrounded(x, rim)


@dataclass(frozen=True)
class _Axis:
    """What goes around a block along one axis; pairs are below and above.

    `ranks` are the neighbours, MPI.PROC_NULL at an edge of the domain. `around` is how many points this rank's block
    gets there, `local` how many of these follow from points that the rank has, beyond an edge or as its own neighbour,
    and `exchanged` how many come from any neighbour, which is 0 where nothing is exchanged. `shared`: there is another
    rank to exchange with.
    """

    rule: Rule
    ranks: tuple[int, int]
    around: tuple[int, int]
    local: tuple[int, int]
    exchanged: tuple[int, int]
    shared: bool


@dataclass(frozen=True)
class _Rim:
    """What goes around a block, and what was fixed beyond edges so far, by the shape, type and device of the result."""

    partition: GridPartition
    axes: tuple[_Axis, ...]
    fixed: dict[tuple[tuple[int, ...], torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )


def _rim(name: str, partition: GridPartition, width: Width | None) -> _Rim:
    """The rim of a partition that the function of this name asks for."""
    given = partition.stencil_width if width is None else width
    each = (given,) * len(partition.shape) if isinstance(given, int) else tuple(given)
    found: _Rim | None = partition.rims.get((name, each))
    if found is None:
        found = partition.rims[name, each] = _new_rim(name, partition, each)
    return found


def _new_rim(name: str, partition: GridPartition, each: tuple[int | tuple[int, int], ...]) -> _Rim:
    if len(each) != len(partition.shape):
        raise ConfigurationError(f"{name}: width = {each}: must have one entry for each of {', '.join(partition.axes)}")
    edges, neighbours = name != "neighbour_halo", name != "pad_edges"
    # A mirror needs the points beside the edge as well.
    most = tuple(
        partition.smallest_block(axis) - (edges and rule == "reflect") for axis, rule in enumerate(partition.boundary)
    )
    widths = [(side, side) if isinstance(side, int) else (side[0], side[1]) for side in each]
    if any(not 0 <= side <= m for pair, m in zip(widths, most, strict=True) for side in pair):
        raise ConfigurationError(
            f"{name}: width = {each}: must be between 0 and what the smallest block of any rank has, {most}"
        )
    axes = []
    for axis, (rule, pair) in enumerate(zip(partition.boundary, widths, strict=True)):
        ranks = partition.neighbour(axis, -1), partition.neighbour(axis, 1)
        here = (MPI.PROC_NULL, partition.comm.rank)
        lower, upper = (
            side if (edges if rank == MPI.PROC_NULL else neighbours) else 0
            for rank, side in zip(ranks, pair, strict=True)
        )
        local = (lower if ranks[0] in here else 0, upper if ranks[1] in here else 0)
        exchanged = pair if neighbours else (0, 0)
        shared = any(exchanged) and any(rank not in here for rank in ranks)
        axes.append(_Axis(rule, ranks, (lower, upper), local, exchanged, shared))
    return _Rim(partition, tuple(axes))


def _check_block(name: str, x: torch.Tensor, partition: GridPartition, larger: bool) -> None:
    own = partition.local_shape[:-1]
    block = tuple(x.shape[-1 - len(own) : -1])
    if x.dim() <= len(own) or (any(b < o for b, o in zip(block, own, strict=True)) if larger else block != own):
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, this rank owns [..., {', '.join(map(str, own))}, channels]"
        )


def _surrounded(x: torch.Tensor, rim: _Rim) -> torch.Tensor:
    """The block with its rim."""
    if not any(any(axis.around) or any(axis.exchanged) for axis in rim.axes):
        return x
    image = linear_map(x, partial(_padded, rim=rim), partial(_folded, rim=rim))
    if not any(isinstance(axis.rule, float) for axis in rim.axes):
        return image
    fixed, values = _fixed(rim, tuple(image.shape[-1 - len(rim.axes) : -1]), x.dtype, x.device)
    return torch.where(fixed, values, image)


def _fixed(
    rim: _Rim, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which points of a padded block of `shape` have fixed values, and these values, both `[*shape, 1]`."""
    key = (shape, dtype, device)
    if key not in rim.fixed:
        fixed, values = torch.zeros(*shape, 1, dtype=torch.bool), torch.zeros(*shape, 1, dtype=dtype)
        # The last axis first, as they are exchanged: what lies beyond along several follows the rule of the first.
        for number, axis in reversed(list(enumerate(rim.axes))):
            value = 0.0 if axis.rule == "zero" else axis.rule
            if isinstance(value, str):
                continue
            starts = (0, shape[number] - axis.around[1])
            for rank, start, width in zip(axis.ranks, starts, axis.around, strict=True):
                if rank == MPI.PROC_NULL:
                    fixed.narrow(number, start, width).fill_(True)
                    values.narrow(number, start, width).fill_(value)
        rim.fixed[key] = fixed.to(device), values.to(device)
    return rim.fixed[key]


def _swap(
    comm: MPI.Comm, axis: _Axis, dim: int, to_lower: torch.Tensor, to_upper: torch.Tensor, lengths: tuple[int, int]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Exchange slabs with the other ranks along `axis`: what came (from the lower, from the upper), None at an edge.

    `lengths` along `dim` are those of the slabs that come: at an edge what goes may be of another one. Slabs on a
    device go by the host's memory, and so do these alone of the field.
    """
    lower, upper = axis.ranks
    from_lower = from_upper = None
    requests = []
    shape = list(to_lower.shape)
    if lower != MPI.PROC_NULL:
        shape[dim] = lengths[0]
        from_lower = torch.empty(shape, dtype=to_lower.dtype)
        requests.append(comm.Irecv([bytes_of(from_lower), MPI.BYTE], lower, _TO_UPPER))
    if upper != MPI.PROC_NULL:
        shape[dim] = lengths[1]
        from_upper = torch.empty(shape, dtype=to_lower.dtype)
        requests.append(comm.Irecv([bytes_of(from_upper), MPI.BYTE], upper, _TO_LOWER))
    if lower != MPI.PROC_NULL:
        requests.append(comm.Isend([bytes_of(to_lower.cpu().contiguous()), MPI.BYTE], lower, _TO_LOWER))
    if upper != MPI.PROC_NULL:
        requests.append(comm.Isend([bytes_of(to_upper.cpu().contiguous()), MPI.BYTE], upper, _TO_UPPER))
    MPI.Request.Waitall(requests)
    return from_lower, from_upper


class _Side(NamedTuple):
    """Points along an axis that follow from others of the block: `width` of them from `start` on.

    They are those from `opposite` on where the block is its own neighbour, and beyond an edge of the domain the one at
    `edge` again and again, or those from `mirrored` on in reverse. `rank` is MPI.PROC_NULL there.
    """

    rank: int
    width: int
    start: int
    opposite: int
    edge: int
    mirrored: int


def _local_sides(axis: _Axis, n: int) -> Iterator[_Side]:
    """The sides of a block of `n` points that need no other rank."""
    lower, upper = axis.around
    if axis.local[0]:
        yield _Side(axis.ranks[0], lower, 0, n, lower, lower + 1)
    if axis.local[1]:
        yield _Side(axis.ranks[1], upper, lower + n, lower, lower + n - 1, lower + n - 1 - upper)


def _padded(x: torch.Tensor, rim: _Rim) -> torch.Tensor:
    comm, first = rim.partition.comm, x.dim() - 1 - len(rim.axes)
    shape, region = list(x.shape), [slice(None)] * x.dim()
    for dim, axis in enumerate(rim.axes, first):
        region[dim] = slice(axis.around[0], axis.around[0] + shape[dim])
        shape[dim] += sum(axis.around)
    padded = x.new_empty(shape)
    padded[tuple(region)] = x
    dims = range(x.dim() - 2, first - 1, -1)
    for dim in dims:
        axis, n = rim.axes[dim - first], x.shape[dim]
        if not axis.shared:
            continue
        # All that is known so far along the other axes; along this one nothing is left out.
        region[dim] = slice(None)
        slab = partial(padded[tuple(region)].narrow, dim)
        lower = axis.around[0]
        below, above = axis.exchanged
        arrived = _swap(comm, axis, dim, slab(lower, above), slab(lower + n - below, below), axis.exchanged)
        for ghosts, start, width in zip(arrived, (0, lower + n), axis.around, strict=True):
            if ghosts is not None and width:
                slab(start, width).copy_(ghosts)
        region[dim] = slice(axis.local[0], shape[dim] - axis.local[1])
    # What follows from points that are here by now, in corners as well, comes last: it need not be sent.
    for dim in dims:
        axis, n = rim.axes[dim - first], x.shape[dim]
        region[dim] = slice(None)
        if not any(axis.local):
            continue
        slab = partial(padded[tuple(region)].narrow, dim)
        for side in _local_sides(axis, n):
            ghost = slab(side.start, side.width)
            if side.rank != MPI.PROC_NULL:
                ghost.copy_(slab(side.opposite, side.width))
            elif axis.rule == "replicate":
                ghost.copy_(slab(side.edge, 1))
            elif axis.rule == "reflect":
                ghost.copy_(slab(side.mirrored, side.width).flip(dim))
            else:
                ghost.zero_()
    return padded


def _folded(cotangent: torch.Tensor, rim: _Rim) -> torch.Tensor:
    """The transpose of `_padded`: what the ghosts received goes back to where it came from, and is added there."""
    comm, first = rim.partition.comm, cotangent.dim() - 1 - len(rim.axes)
    folded = cotangent.detach().clone(memory_format=torch.contiguous_format)
    region = [slice(None)] * folded.dim()
    for dim, axis in enumerate(rim.axes, first):
        lower, upper = axis.around
        n = folded.shape[dim] - lower - upper
        slab = partial(folded[tuple(region)].narrow, dim)
        for side in _local_sides(axis, n):
            ghost = slab(side.start, side.width)
            if side.rank != MPI.PROC_NULL:
                slab(side.opposite, side.width).add_(ghost)
            elif axis.rule == "replicate":
                slab(side.edge, 1).add_(ghost.sum(dim=dim, keepdim=True))
            elif axis.rule == "reflect":
                slab(side.mirrored, side.width).add_(ghost.flip(dim))
        region[dim] = slice(axis.local[0], folded.shape[dim] - axis.local[1])
    for dim, axis in enumerate(rim.axes, first):
        lower, upper = axis.around
        below, above = axis.exchanged
        n = folded.shape[dim] - lower - upper
        if axis.shared:
            region[dim] = slice(None)
            slab = partial(folded[tuple(region)].narrow, dim)
            arrived = _swap(comm, axis, dim, slab(0, lower), slab(lower + n, upper), (above, below))
            for cotangents, start, width in zip(arrived, (lower, lower + n - below), (above, below), strict=True):
                if cotangents is not None:
                    slab(start, width).add_(cotangents.to(folded.device))
        region[dim] = slice(lower, lower + n)
    return folded[tuple(region)].contiguous()
