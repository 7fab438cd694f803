"""Observation operators on a partitioned state: sub-sampling, interpolation to points, and the global mean.

An operator takes this rank's part of a state and returns the observed values that belong to this rank. Each value
belongs to one rank alone, so that sums over ranks count it once. `part_of` takes this rank's values from all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import halo
from pnode_dist.exchange.sums import global_sum
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.protocol import Partition


class Subsample:
    """Every `every`-th entry of a partitioned state, from the index `first` on, along each axis of its global array.

    `every` and `first` are one number for all axes, or one for each of `partition.global_shape`. One number leaves the
    last axis of several, which holds the channels, whole. Takes `[..., *local_shape]` and returns `[..., *chosen]`,
    this rank's block of the chosen entries, which may be empty. Not collective.

    Raises `ConfigurationError` for numbers that choose no entry.
    """

    def __init__(self, partition: Partition, every: int | Sequence[int], first: int | Sequence[int] = 0) -> None:
        shape = partition.global_shape
        self.partition = partition
        self.every, self.first = _each_axis("every", every, shape, 1), _each_axis("first", first, shape, 0)
        for axis, (step, start, length) in enumerate(zip(self.every, self.first, shape, strict=True)):
            if step < 1 or not 0 <= start < length:
                raise ConfigurationError(
                    f"subsample: every = {step}, first = {start} along axis {axis} of {length}: every must be at least "
                    f"1, and first from 0 to {length - 1}"
                )
        owned = [np.arange(n)[own] for n, own in zip(shape, partition.owned_slices(partition.comm.rank), strict=True)]
        chosen = [
            (index >= start) & ((index - start) % step == 0)
            for index, step, start in zip(owned, self.every, self.first, strict=True)
        ]
        self._local = [torch.from_numpy(np.flatnonzero(mask)) for mask in chosen]
        self._places = [
            torch.from_numpy((index[mask] - start) // step)
            for index, mask, step, start in zip(owned, chosen, self.every, self.first, strict=True)
        ]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values of all ranks."""
        sizes = zip(self.partition.global_shape, self.every, self.first, strict=True)
        return tuple(len(range(start, length, step)) for length, step, start in sizes)

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        """Return the chosen entries of this rank's part."""
        return _selected(state, self._local)

    def part_of(self, values: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the values `[..., *shape]` of all ranks."""
        _check_values("subsample", values, self.shape)
        return _selected(values, self._places)


class Points:
    """The state at `points` `[n, axes]` of a grid, by linear interpolation between the nearest points of the grid.

    Coordinates are in grid spacings: 0 is the first point of an axis, and n - 1 the last of n. A periodic axis goes on
    to n, where it begins again. Takes `[*local_shape]` and returns `[n_local, channels]`, the points within this rank's
    block in their order in `points`. Collective on the partition's communicator, and so is its gradient.

    Raises `ConfigurationError` for points outside the grid.
    """

    def __init__(self, partition: GridPartition, points: Any) -> None:
        given = torch.as_tensor(points, dtype=torch.float64)
        axes = len(partition.shape)
        if given.dim() != 2 or given.shape[1] != axes:
            raise ConfigurationError(f"points: an array of shape {tuple(given.shape)}: must be [n, {axes}]")
        cells = given.floor()
        for axis, (n, rule) in enumerate(zip(partition.shape, partition.boundary, strict=True)):
            last = n if rule == "periodic" else n - 1
            places = given[:, axis]
            outside = places[~((places >= 0) & (places <= last))]
            if outside.numel():
                raise ConfigurationError(
                    f"points: {outside[0].item():g} along {partition.axes[axis]}: must be from 0 to {last}"
                )
            # The end of an axis belongs to its last cell.
            cells[:, axis].clamp_(max=n - 1)
        self.partition, self.count = partition, len(given)
        starts, stops = (torch.tensor(ends) for ends in zip(*partition.owned, strict=True))
        self._own = ((cells >= starts) & (cells < stops)).all(dim=1)
        # The halo has one point before this rank's first.
        self._corner = (cells[self._own] - starts + 1).long()
        self._weight = (given - cells)[self._own]

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        """Return the values at this rank's points."""
        wide = halo(state, self.partition, 1)
        total = torch.zeros(len(self._corner), self.partition.channels, dtype=state.dtype)
        for upper in product((0, 1), repeat=self._corner.shape[1]):
            corner = [self._corner[:, axis] + side for axis, side in enumerate(upper)]
            sides = [self._weight[:, axis] if side else 1 - self._weight[:, axis] for axis, side in enumerate(upper)]
            total = total + wide[tuple(corner)] * torch.stack(sides).prod(dim=0)[:, None].to(state.dtype)
        return total

    def part_of(self, values: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of the values `[..., n, channels]` of all points."""
        _check_values("points", values, (self.count, self.partition.channels))
        return values[..., self._own, :]


class GlobalMean:
    """The mean of each channel over the whole grid or all nodes, as one value `[1, channels]` of the first rank.

    The last axis of the partition's global array holds the channels. Takes `[*local_shape]` and returns
    `[0, channels]` on the other ranks. `weights` `[*local_shape[:-1]]` of this rank, such as areas of cells, make it a
    weighted mean. Collective on the partition's communicator, and so is its gradient.

    Raises `ConfigurationError` for weights of another shape, or that do not add up to a positive number.
    """

    def __init__(self, partition: Partition, weights: torch.Tensor | None = None) -> None:
        own, comm = partition.local_shape[:-1], partition.comm
        given = torch.ones(own, dtype=torch.float64) if weights is None else weights.detach().double()
        wrong = any(comm.allgather(tuple(given.shape) != own))
        total = math.nan if wrong else comm.allreduce(given.sum().item())
        if not 0 < total < math.inf:
            raise ConfigurationError(
                f"weights: shape {tuple(given.shape)} and sum {total:g}: must have this rank's shape {own} and a "
                "positive sum"
            )
        self.partition = partition
        self._weights = (given / total)[..., None]
        self._values = 1 if comm.rank == 0 else 0

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        """Return the mean on the first rank."""
        share = (state * self._weights.to(state.dtype)).flatten(0, -2).sum(dim=0, keepdim=True)
        return global_sum(share, self.partition.comm)[: self._values]

    def part_of(self, values: torch.Tensor) -> torch.Tensor:
        """Return the value `[..., 1, channels]` on the first rank, and `[..., 0, channels]` on the others."""
        _check_values("global mean", values, (1, self.partition.global_shape[-1]))
        return values[..., : self._values, :]


def _selected(tensor: torch.Tensor, indices: Sequence[torch.Tensor]) -> torch.Tensor:
    for axis, index in enumerate(indices, tensor.dim() - len(indices)):
        tensor = tensor.index_select(axis, index)
    return tensor


def _each_axis(name: str, given: int | Sequence[int], shape: tuple[int, ...], whole: int) -> tuple[int, ...]:
    if isinstance(given, int):
        return (given,) if len(shape) == 1 else (*(given,) * (len(shape) - 1), whole)
    if len(given) != len(shape):
        raise ConfigurationError(f"subsample: {name} = {tuple(given)}: must have one entry for each axis of {shape}")
    return tuple(given)


def _check_values(name: str, values: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(values.shape[values.dim() - len(shape) :]) != shape:
        raise ConfigurationError(f"{name}: values of shape {tuple(values.shape)}: must be [..., {shape}]")
