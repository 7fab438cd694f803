"""The halo of a block of a grid: the neighbouring points that a stencil needs.

A block is surrounded by points of neighbouring ranks, and by points beyond the edges of the domain, which follow a
boundary rule. `neighbour_halo` adds the first, with communication. `pad_edges` adds the second, without. `halo` adds
both. All three fill the sides of one axis after the other, beginning with the last axis. Each axis includes the points
that were added before, so that corners need no messages of their own, and a rank sends at most two messages for each
axis. Points from other ranks are added first. Points that follow from local ones are added after that, and are never
sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from mpi4py import MPI

from pnode_dist.distributed.buffers import bytes_of
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.compiled import exchange, is_compiled, number_of
from pnode_dist.exchange.linear_map import linear_map, outside_graphs_of_old_torch
from pnode_dist.partition.grid import GridPartition, Rule
from pnode_dist.system.torch_internals import evaluated_while_tracing

Width = int | Sequence[int | tuple[int, int]]
"""A number of points: one for all axes, or for each axis a number or a pair of numbers, below and above."""

_TO_LOWER, _TO_UPPER = 1, 2


def halo(x: torch.Tensor, partition: GridPartition, width: Width | None = None) -> torch.Tensor:
    """Return the rank's block with the points around it. Collective on the partition's communicator.

    `x` is `[..., *local, channels]`, of any floating type and any number of channels. The result is wider by `width`
    points on each side, by default by the partition's stencil width. Beyond the domain the partition's boundary rules
    apply; in corners the rule of the first axis applies last. Raises `ConfigurationError` if the width exceeds the
    smallest block, less one point for `reflect`.
    """
    return _surrounded("halo", x, partition, width)


def neighbour_halo(x: torch.Tensor, partition: GridPartition, width: Width | None = None) -> torch.Tensor:
    """Return the rank's block with the points of neighbouring ranks only. Collective on the partition's communicator.

    A periodic axis has no edge: a rank that is alone along it is its own neighbour. `pad_edges` adds the remaining
    points: `pad_edges(neighbour_halo(x, partition, width), partition, width)` is `halo(x, partition, width)`. Raises
    `ConfigurationError` if the width exceeds the smallest block.
    """
    return _surrounded("neighbour_halo", x, partition, width)


def pad_edges(x: torch.Tensor, partition: GridPartition, width: Width | None = None) -> torch.Tensor:
    """Return a block with the points beyond the domain only. Neither this nor its derivatives are collective.

    `x` is `[..., *block, channels]`: the rank's own points with any number of its neighbours' points around them.
    Raises `ConfigurationError` if the width exceeds the smallest block, less one point for `reflect`.
    """
    return _surrounded("pad_edges", x, partition, width)


@dataclass(frozen=True)
class _Axis:
    """The rim of a block along one axis. Pairs are below and above.

    - `ranks`: the neighbours, MPI.PROC_NULL at an edge of the domain.
    - `around`: the numbers of points added to this rank's block.
    - `local`: the numbers of these points that follow from local ones, beyond an edge or with the rank as its own
      neighbour.
    - `exchanged`: the numbers of points that any rank gets from a neighbour, 0 without an exchange.
    - `shared`: this rank exchanges points with another one.
    """

    rule: Rule
    ranks: tuple[int, int]
    around: tuple[int, int]
    local: tuple[int, int]
    exchanged: tuple[int, int]
    shared: bool


@dataclass(frozen=True)
class _Rim:
    """The rim of a block. `fixed` caches fixed boundary values by shape, type and device of the result."""

    partition: GridPartition
    axes: tuple[_Axis, ...]
    fixed: dict[tuple[tuple[int, ...], torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )

    @cached_property
    def points(self) -> bool:
        """True if there is a point to add or to exchange."""
        return any(any(axis.around) or any(axis.exchanged) for axis in self.axes)

    @cached_property
    def has_fixed_values(self) -> bool:
        """True if an edge of the domain has a Dirichlet value."""
        return any(isinstance(axis.rule, float) for axis in self.axes)


def _rim(name: str, partition: GridPartition, width: Width | None) -> _Rim:
    """Return the rim for the function called `name`, from the partition's cache if possible."""
    each = _each(partition, width)
    found: _Rim | None = partition.rims.get((name, each))
    if found is None:
        found = partition.rims[name, each] = _new_rim(name, partition, each)
    return found


def _each(partition: GridPartition, width: Width | None) -> tuple[int | tuple[int, int], ...]:
    given = partition.stencil_width if width is None else width
    return (given,) * len(partition.shape) if isinstance(given, int) else tuple(given)


def _new_rim(name: str, partition: GridPartition, each: tuple[int | tuple[int, int], ...]) -> _Rim:
    if len(each) != len(partition.shape):
        raise ConfigurationError(f"{name}: width = {each}: must have one entry for each of {', '.join(partition.axes)}")
    edges, neighbours = name != "neighbour_halo", name != "pad_edges"
    # Reflection needs one more point: the edge itself is not repeated.
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


def _check_block(name: str, shape: tuple[int, ...], partition: GridPartition) -> None:
    own = partition.local_shape[:-1]
    block = shape[-1 - len(own) : -1]
    larger = name == "pad_edges"
    if len(shape) <= len(own) or (any(b < o for b, o in zip(block, own, strict=True)) if larger else block != own):
        raise ValueError(f"{name}: got shape {shape}, this rank owns [..., {', '.join(map(str, own))}, channels]")


def _surrounded(name: str, x: torch.Tensor, partition: GridPartition, width: Width | None) -> torch.Tensor:
    """Return the block with its rim, differentiable, for the function called `name`."""
    if is_compiled():
        return _surrounded_in_compiled_code(name, x, partition, width)
    return _surrounded_outside_graphs(name, x, partition, width)


@outside_graphs_of_old_torch
def _surrounded_outside_graphs(
    name: str, x: torch.Tensor, partition: GridPartition, width: Width | None
) -> torch.Tensor:
    rim = _rim(name, partition, width)
    _check_block(name, tuple(x.shape), partition)
    if not rim.points:
        return x
    image = linear_map(x, partial(_padded, rim=rim), partial(_folded, rim=rim))
    if not rim.has_fixed_values:
        return image
    fixed, values = _fixed(rim, tuple(image.shape[-1 - len(rim.axes) : -1]), x.dtype, x.device)
    return torch.where(fixed, values, image)


def _surrounded_in_compiled_code(
    name: str, x: torch.Tensor, partition: GridPartition, width: Width | None
) -> torch.Tensor:
    number, shape, fixed = _registered(name, tuple(x.shape), partition, width)
    if number is None:
        return x
    image = exchange(x, number, shape)
    for axis, start, length, value in fixed:
        image.narrow(axis, start, length).fill_(value)
    return image


@evaluated_while_tracing
def _registered(
    name: str, shape: tuple[int, ...], partition: GridPartition, width: Width | None
) -> tuple[int | None, tuple[int, ...], tuple[_FixedPoints, ...]]:
    """Return the rim's number, and shape and fixed values of the result. No number for no rim."""
    rim = _rim(name, partition, width)
    _check_block(name, shape, partition)
    if not rim.points:
        return None, shape, ()
    first = len(shape) - 1 - len(rim.axes)
    block = tuple(n + sum(axis.around) for n, axis in zip(shape[first:-1], rim.axes, strict=True))
    key = (name, _each(partition, width))
    number = number_of(partition, key, partial(_padded_by, key=key), partial(_folded_by, key=key))
    fixed = tuple(_fixed_points(rim, block)) if rim.has_fixed_values else ()
    return number, (*shape[:first], *block, shape[-1]), fixed


def _padded_by(x: torch.Tensor, partition: GridPartition, key: object) -> torch.Tensor:
    return _padded(x, partition.rims[key])


def _folded_by(cotangent: torch.Tensor, partition: GridPartition, key: object) -> torch.Tensor:
    return _folded(cotangent, partition.rims[key])


_FixedPoints = tuple[int, int, int, float]
"""An axis, counted from the end, the first of the points with a fixed value along it, their number, and the value."""


def _fixed_points(rim: _Rim, shape: tuple[int, ...]) -> Iterator[_FixedPoints]:
    """Yield the fixed points of a padded block of `shape`, in the order in which the rules apply."""
    # The last axis first, as in the exchange: in corners the rule of the first axis applies last.
    for number, axis in reversed(list(enumerate(rim.axes))):
        value = 0.0 if axis.rule == "zero" else axis.rule
        if isinstance(value, str):
            continue
        starts = (0, shape[number] - axis.around[1])
        for rank, start, width in zip(axis.ranks, starts, axis.around, strict=True):
            if rank == MPI.PROC_NULL:
                yield number - len(rim.axes) - 1, start, width, value


def _fixed(
    rim: _Rim, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a mask of the points of a padded block with fixed values, and these values, both `[*shape, 1]`."""
    key = (shape, dtype, device)
    if key not in rim.fixed:
        fixed, values = torch.zeros(*shape, 1, dtype=torch.bool), torch.zeros(*shape, 1, dtype=dtype)
        for axis, start, width, value in _fixed_points(rim, shape):
            fixed.narrow(axis, start, width).fill_(True)
            values.narrow(axis, start, width).fill_(value)
        rim.fixed[key] = fixed.to(device), values.to(device)
    return rim.fixed[key]


def _swap(
    comm: MPI.Comm, axis: _Axis, dim: int, to_lower: torch.Tensor, to_upper: torch.Tensor, lengths: tuple[int, int]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Exchange slabs with the neighbours along `axis`. Returns those from the lower and the upper one; None at an edge.

    `lengths` are the lengths of the received slabs along `dim`, which can differ from those of the sent ones at an
    edge. Slabs on a device are copied through the host's memory.
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
    """`width` points along an axis, from `start` on, that follow from local points.

    If the block is its own neighbour they are copies of the points from `opposite` on. Beyond an edge of the domain
    `rank` is MPI.PROC_NULL; they are copies of the point at `edge`, or of the points from `mirrored` on in reverse
    order.
    """

    rank: int
    width: int
    start: int
    opposite: int
    edge: int
    mirrored: int


def _local_sides(axis: _Axis, n: int) -> Iterator[_Side]:
    """Yield the sides of a block of `n` points that need no other rank."""
    lower, upper = axis.around
    if axis.local[0]:
        yield _Side(axis.ranks[0], lower, 0, n, lower, lower + 1)
    if axis.local[1]:
        yield _Side(axis.ranks[1], upper, lower + n, lower, lower + n - 1, lower + n - 1 - upper)


def _padded(x: torch.Tensor, rim: _Rim) -> torch.Tensor:
    """Return the block with its rim; fixed values are zero."""
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
        # Include the points added so far along the other axes, and all points along this axis.
        region[dim] = slice(None)
        slab = partial(padded[tuple(region)].narrow, dim)
        lower = axis.around[0]
        below, above = axis.exchanged
        arrived = _swap(comm, axis, dim, slab(lower, above), slab(lower + n - below, below), axis.exchanged)
        for ghosts, start, width in zip(arrived, (0, lower + n), axis.around, strict=True):
            if ghosts is not None and width:
                slab(start, width).copy_(ghosts)
        region[dim] = slice(axis.local[0], shape[dim] - axis.local[1])
    # Add the points that follow from local ones last, corners included: they are never sent.
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
    """Apply the transpose of `_padded`: add the cotangents of the ghosts to the points that they came from."""
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
