"""The halo of a block of a grid: the neighbouring points that a stencil sees."""

from __future__ import annotations

from functools import partial

import torch
from mpi4py import MPI

from pnode_dist.buffers import bytes_of
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.linear_map import linear_map
from pnode_dist.partition.grid import GridPartition

Width = int | tuple[int, int]

_TO_LOWER, _TO_UPPER = 1, 2
_AXES = (-3, -2)


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
    image = linear_map(x, padded, folded)
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
