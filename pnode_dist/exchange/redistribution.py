"""Redistribution of a field from one partition of a grid to another, for operations that need whole lines of points.

On a grid of one axis each batch index and channel has one line. `to_lines` divides the lines over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from mpi4py import MPI

from pnode_dist.distributed.buffers import bytes_of, contiguous
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.compiled import exchange, is_compiled, number_of
from pnode_dist.exchange.linear_map import linear_map
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.protocol import even_ranges
from pnode_dist.system.torch_internals import evaluated_while_tracing

_TAG = 3

Box = tuple[slice, ...]
"""A part of a block: a slice for each axis of the grid."""


def redistribute(x: torch.Tensor, source: GridPartition, target: GridPartition) -> torch.Tensor:
    """Return this rank's block of `target` of a field whose blocks of `source` are given. Collective.

    `x` is `[..., *source local, channels]` of any type, real or complex, and with any number of channels; the result is
    `[..., *target local, channels]`. Two ranks exchange at most one message in each direction, and none if their blocks
    have no common point. The adjoint is the redistribution from `target` to `source`. Raises `ConfigurationError` for
    grids of different shapes or numbers of ranks, and `ValueError` for another block.
    """
    if is_compiled():
        number, shape = _registered(tuple(x.shape), source, target)
        return x if number is None else exchange(x, number, shape)
    plan = _plan(source, target)
    _check_block(tuple(x.shape), plan)
    if plan.unchanged:
        return x
    return linear_map(x, partial(_moved, plan=plan), partial(_moved, plan=plan.reverse))


def to_lines(x: torch.Tensor, partition: GridPartition) -> torch.Tensor:
    """Return this rank's share of the lines of a field on a grid of one axis, `[lines, points]`. Collective.

    `x` is `[..., local, channels]`. The leading axes and the channels, flattened in the order `[..., channels]`, number
    the lines. The ranks have consecutive ones, whose numbers differ by at most one; with fewer lines than ranks the
    last ranks have none. Two ranks exchange at most one message in each direction. The adjoint is `from_lines`.
    """
    points, channels = x.shape[-2:]
    lines = x.movedim(-1, -2).reshape(math.prod(x.shape[:-2]) * channels, points, 1)
    if is_compiled():
        moved = exchange(lines, *_registered_lines(len(lines), partition, forward=True))
    else:
        plan = _line_plan(partition, len(lines))
        moved = linear_map(lines, partial(_moved, plan=plan), partial(_moved, plan=plan.reverse))
    return moved.squeeze(-1)


def from_lines(lines: torch.Tensor, partition: GridPartition, numbering: Sequence[int]) -> torch.Tensor:
    """Return this rank's block `[..., local, channels]` of a field of which the lines are given. Inverse of `to_lines`.

    `lines` is `[lines, points]`, and `numbering` the shape `[..., channels]` of the numbers of all lines. Collective.
    """
    count = math.prod(numbering)
    if is_compiled():
        moved = exchange(lines.unsqueeze(-1), *_registered_lines(count, partition, forward=False))
    else:
        plan = _line_plan(partition, count).reverse
        moved = linear_map(lines.unsqueeze(-1), partial(_moved, plan=plan), partial(_moved, plan=plan.reverse))
    return moved.reshape(*numbering, moved.shape[-2]).movedim(-2, -1).contiguous()


@dataclass(frozen=True)
class _Plan:
    """The parts of a block that go to each rank, and the parts of the new block that come from each rank.

    Boxes are relative to the block. A rank without a common point has none.
    """

    comm: MPI.Comm
    before: tuple[int, ...]
    after: tuple[int, ...]
    sent: tuple[tuple[int, Box], ...]
    received: tuple[tuple[int, Box], ...]
    unchanged: bool

    @cached_property
    def reverse(self) -> _Plan:
        """The plan of the way back."""
        return _Plan(self.comm, self.after, self.before, self.received, self.sent, self.unchanged)


def _key(target: GridPartition) -> tuple[Hashable, ...]:
    """Return the name of a redistribution to `target` among the exchanges of another partition."""
    return ("redistribute", target.shape, target.processes, *map(tuple, target.ranges))


def _plan(source: GridPartition, target: GridPartition) -> _Plan:
    """Return the plan of a redistribution, from the cache of `source` if possible."""
    key = _key(target)
    found: _Plan | None = source.rims.get(key)
    if found is None:
        found = source.rims[key] = _new_plan(source, target)
    return found


def _new_plan(source: GridPartition, target: GridPartition) -> _Plan:
    comm = source.comm
    if source.shape != target.shape or comm.size != target.comm.size or comm.rank != target.comm.rank:
        raise ConfigurationError(
            f"redistribute: from {source.shape} on {comm.size} ranks to {target.shape} on {target.comm.size} ranks: "
            "must be one grid on the same ranks"
        )
    return _Plan(
        comm,
        source.local_shape[:-1],
        target.local_shape[:-1],
        tuple(_common_boxes(source, target)),
        tuple(_common_boxes(target, source)),
        source.processes == target.processes and source.ranges == target.ranges,
    )


def _line_plan(partition: GridPartition, count: int) -> _Plan:
    """Return the plan from blocks of points `[lines, local points]` to shares of `count` lines `[lines, points]`."""
    key = ("lines", count)
    found: _Plan | None = partition.rims.get(key)
    if found is None:
        comm, ((begin, end),), (points,) = partition.comm, partition.owned, partition.shape
        shares = even_ranges(count, comm.size)
        first, last = shares[comm.rank]
        # A rank without lines sends its points to the others, and receives nothing.
        sent = [(rank, (slice(*share), slice(0, end - begin))) for rank, share in enumerate(shares)]
        received = [(rank, (slice(0, last - first), slice(*own))) for rank, own in enumerate(partition.ranges[0])]
        found = partition.rims[key] = _Plan(
            comm,
            (count, end - begin),
            (last - first, points),
            tuple((rank, box) for rank, box in sent if shares[rank][0] < shares[rank][1]),
            tuple(received) if first < last else (),
            comm.size == 1,
        )
    return found


def _common_boxes(own: GridPartition, other: GridPartition) -> list[tuple[int, Box]]:
    """Return the parts of this rank's block of `own` that the ranks own in `other`."""
    found = []
    for rank in range(own.comm.size):
        box = _intersection(own.owned, other.owned_slices(rank)[:-1])
        if box is not None:
            found.append((rank, box))
    return found


def _intersection(owned: Sequence[tuple[int, int]], other: Box) -> Box | None:
    box = []
    for (start, stop), there in zip(owned, other, strict=True):
        low, high = max(start, there.start), min(stop, there.stop)
        if low >= high:
            return None
        box.append(slice(low - start, high - start))
    return tuple(box)


def _check_block(shape: tuple[int, ...], plan: _Plan) -> None:
    axes = len(plan.before)
    if len(shape) <= axes or shape[-1 - axes : -1] != plan.before:
        wanted = ", ".join(map(str, plan.before))
        raise ValueError(f"redistribute: got shape {shape}, this rank owns [..., {wanted}, channels]")


def _part(x: torch.Tensor, box: Box) -> torch.Tensor:
    """Return a box of `[..., *block, channels]` as a view."""
    for axis, own in enumerate(box, x.dim() - 1 - len(box)):
        x = x.narrow(axis, own.start, own.stop - own.start)
    return x


def _moved(x: torch.Tensor, plan: _Plan) -> torch.Tensor:
    comm, leading = plan.comm, x.shape[: x.dim() - 1 - len(plan.before)]
    image = torch.empty((*leading, *plan.after, x.shape[-1]), dtype=x.dtype)
    # A part from this rank itself is copied, and needs no message.
    sent, received, requests = dict(plan.sent), dict(plan.received), []
    own = sent.pop(comm.rank, None), received.pop(comm.rank, None)
    arriving = [torch.empty(_part(image, box).shape, dtype=x.dtype) for box in received.values()]
    for rank, part in zip(received, arriving, strict=True):
        requests.append(comm.Irecv([bytes_of(part), MPI.BYTE], rank, _TAG))
    for rank, box in sent.items():
        requests.append(comm.Isend([bytes_of(contiguous(_part(x, box))), MPI.BYTE], rank, _TAG))
    if own[0] is not None and own[1] is not None:
        _part(image, own[1]).copy_(_part(x, own[0]))
    MPI.Request.Waitall(requests)
    for box, part in zip(received.values(), arriving, strict=True):
        _part(image, box).copy_(part)
    return image.to(x.device)


# In code that torch.compile compiles


@evaluated_while_tracing
def _registered(
    shape: tuple[int, ...], source: GridPartition, target: GridPartition
) -> tuple[int | None, tuple[int, ...]]:
    """Return the number of the map, and the shape of its result. No number for a redistribution to the same blocks."""
    plan = _plan(source, target)
    _check_block(shape, plan)
    if plan.unchanged:
        return None, shape
    forward, transpose = partial(_moved_by, plan=plan), partial(_moved_by, plan=plan.reverse)
    number = number_of(source, _key(target), forward, transpose)
    return number, (*shape[: len(shape) - 1 - len(plan.before)], *plan.after, shape[-1])


@evaluated_while_tracing
def _registered_lines(count: int, partition: GridPartition, forward: bool) -> tuple[int, tuple[int, ...]]:
    """Return the number of the map to or from shares of `count` lines, and the shape of its result."""
    plan = _line_plan(partition, count)
    if not forward:
        plan = plan.reverse
    there, back = partial(_moved_by, plan=plan), partial(_moved_by, plan=plan.reverse)
    return number_of(partition, ("lines", count, forward), there, back), (*plan.after, 1)


def _moved_by(x: torch.Tensor, _: GridPartition, plan: _Plan) -> torch.Tensor:
    return _moved(x, plan)
