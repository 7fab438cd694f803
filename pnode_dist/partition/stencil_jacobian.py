"""The Jacobian of a stencil operator on a partitioned grid as a PETSc matrix, found from a few products J v."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from petsc4py import PETSc

from pnode_dist.partition import protocol
from pnode_dist.partition.colouring import NONE, Integers, colour_grid
from pnode_dist.partition.grid import GridPartition

Product = Callable[[torch.Tensor], torch.Tensor]


class StencilJacobian:
    """`shift` M - J for the Jacobian J of a function f of a grid's state. Collective on the partition's communicator.

    The state of a rank is `shape = [*leading, ny_local, nx_local, channels]`, by default the partition's
    `local_shape`, one contiguous block in the state's Vec; leading axes and channels are the same on all ranks.
    f at a point may depend on all channels of the same sample within `width`, one number or `(wy, wx)`, in the
    directions of both axes, around the end of a periodic axis. `width` may exceed blocks and grid.

    `matrix` is a PETSc AIJ Mat of block size `channels` in the Vec's numbering; its nonzero pattern is made once and
    its values belong to the last `assemble`. `products` is the number of J v that one takes: colours times channels,
    with the samples side by side in each.
    Raises `ConfigurationError` for a negative width and `ValueError` for a shape that is not the partition's.
    """

    def __init__(
        self, partition: GridPartition, width: int | tuple[int, int], shape: Sequence[int] | None = None
    ) -> None:
        self.partition = partition
        self.shape = partition.local_shape if shape is None else tuple(shape)
        if len(self.shape) < 3 or self.shape[-3:-1] != partition.local_shape[:2]:
            raise ValueError(
                f"stencil Jacobian: got a state of shape {self.shape}, this rank owns [..., "
                f"{partition.local_shape[0]}, {partition.local_shape[1]}, channels]"
            )
        self._samples, self._channels = math.prod(self.shape[:-3]), self.shape[-1]
        self._field = (self._samples, *self.shape[-3:])
        self._size = math.prod(self.shape)
        self.colouring = colour_grid(partition.shape, width, partition.boundary)
        self.products = self.colouring.count * self._channels
        self._colour_y, self._colour_x = (
            torch.from_numpy(axis.colour[slice(*owned)])
            for axis, owned in zip((self.colouring.y, self.colouring.x), partition.owned, strict=True)
        )
        self._diagonal = self._own_entries()
        self.matrix = self._preallocated()

    def _own_entries(self) -> torch.Tensor:
        """Where in the values each row's own column is found."""
        colour = self._colour_y[:, None] * self.colouring.x.count + self._colour_x
        products = colour[..., None] * self._channels + torch.arange(self._channels)
        return products.expand(self._samples, *products.shape).reshape(-1) * self._size + torch.arange(self._size)

    def _preallocated(self) -> PETSc.Mat:
        everything = self._samples * self._channels * math.prod(self.partition.shape)
        matrix = PETSc.Mat().create(comm=self.partition.comm)
        matrix.setSizes(((self._size, everything), (self._size, everything)), bsize=self._channels)
        matrix.setType(PETSc.Mat.Type.AIJ)
        blocks = _blocks(self.partition, self._samples * self._channels)
        start = blocks.first[self.partition.position]
        rows = np.arange(start, start + self._size, dtype=PETSc.IntType)
        columns = self._columns(blocks)
        matrix.setPreallocationCOO(np.broadcast_to(rows, columns.shape).reshape(-1), columns.reshape(-1))
        return matrix

    def _columns(self, blocks: _Blocks) -> Integers:
        """`[products, rows]`: the column of each row that a product shows, or `NONE`, which PETSc skips."""
        (y0, y1), (x0, x1) = self.partition.owned
        columns = np.empty((self.products, *self._field), dtype=PETSc.IntType)
        sample = np.arange(self._samples)[:, None, None]
        colours = product(self.colouring.y.source[y0:y1].T, self.colouring.x.source[x0:x1].T)
        for number, (y, x) in enumerate(colours):
            row = np.searchsorted(blocks.tops, y, "right") - 1
            column = np.searchsorted(blocks.lefts, x, "right") - 1
            below, beside = (y - blocks.tops[row])[:, None], x - blocks.lefts[column]
            point = (sample * blocks.heights[row][:, None] + below) * blocks.widths[column] + beside
            entry = blocks.first[row[:, None], column] + point * self._channels
            missing = (y == NONE)[:, None] | (x == NONE)
            for channel in range(self._channels):
                # All channels of the row's point see it.
                columns[number * self._channels + channel] = np.where(missing, NONE, entry + channel)[..., None]
        return columns.reshape(self.products, self._size)

    def assemble(self, jvp: Product, shift: float, mass: torch.Tensor | None = None) -> PETSc.Mat:
        """Fill `matrix` with `shift` M - J and return it. Collective on the partition's communicator.

        `jvp(v)` is J v for the flat local float64 `v`, itself flat and local; it is called `products` times, on all
        ranks together. `mass` is the diagonal of M, flat and local; None stands for the identity.
        Raises `ValueError` when a product or `mass` does not have one entry for each of the state's.
        """
        if mass is not None and tuple(mass.shape) != (self._size,):
            raise ValueError(f"stencil Jacobian: mass has shape {tuple(mass.shape)}, the state {self._size} entries")
        # One row a product: each J v is stored as it comes. As large as the matrix, and not kept.
        values = torch.empty(self.products, self._size, dtype=torch.float64)
        number = 0
        for colour_y, colour_x in product(range(self.colouring.y.count), range(self.colouring.x.count)):
            points = (self._colour_y == colour_y)[:, None] & (self._colour_x == colour_x)
            for channel in range(self._channels):
                seed = torch.zeros(self._size, dtype=torch.float64)
                seed.view(self._field)[..., channel] = points.double()
                torch.neg(self._checked(jvp(seed)), out=values[number])
                number += 1
        on_diagonal = torch.full((self._size,), shift, dtype=torch.float64) if mass is None else shift * mass.double()
        values.view(-1)[self._diagonal] += on_diagonal
        self.matrix.setValuesCOO(values.numpy().reshape(-1))
        return self.matrix

    def missed(self, jvp: Product, shift: float, mass: torch.Tensor | None = None) -> float:
        """How much of J the stencil misses: |(J - J') r| / |J r| with J' the J of `matrix`, for a random r.

        For the arguments of the last `assemble` that is rounding error as long as `width` is no smaller than the
        reach of f. Takes one product. Collective on the partition's communicator, and the same on all ranks.
        """
        comm = self.partition.comm
        r = torch.randn(self._size, generator=torch.Generator().manual_seed(comm.rank), dtype=torch.float64)
        probe, image = self.matrix.createVecs()
        protocol.view(probe, (self._size,)).copy_(r)
        probe.stateIncrease()
        self.matrix.mult(probe, image)
        wanted = self._checked(jvp(r))
        assembled = shift * (r if mass is None else mass * r) - protocol.view(image, (self._size,))
        ours = np.array([float((wanted - assembled).square().sum()), float(wanted.square().sum())])
        difference, whole = (math.sqrt(total) for total in comm.allreduce(ours))
        return difference / whole if whole > 0 else difference

    def _checked(self, image: torch.Tensor) -> torch.Tensor:
        if tuple(image.shape) != (self._size,):
            raise ValueError(f"stencil Jacobian: J v has shape {tuple(image.shape)}, the state {self._size} entries")
        return image.detach().double()


@dataclass(frozen=True)
class _Blocks:
    """The blocks of all ranks: their first rows and columns, how many these are, and their first entries in the Vec."""

    tops: Integers
    heights: Integers
    lefts: Integers
    widths: Integers
    first: Integers


def _blocks(partition: GridPartition, entries_per_point: int) -> _Blocks:
    py, px = partition.processes
    tops, heights = _starts_and_lengths([partition.owned_slices(row * px)[0] for row in range(py)])
    lefts, widths = _starts_and_lengths([partition.owned_slices(column)[1] for column in range(px)])
    sizes = entries_per_point * heights[:, None] * widths
    return _Blocks(tops, heights, lefts, widths, (np.cumsum(sizes) - sizes.reshape(-1)).reshape(py, px))


def _starts_and_lengths(slices: Sequence[slice]) -> tuple[Integers, Integers]:
    starts = np.array([part.start for part in slices], dtype=np.int64)
    stops = np.array([part.stop for part in slices], dtype=np.int64)
    return starts, stops - starts
