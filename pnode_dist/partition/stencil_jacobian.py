"""The Jacobian of a stencil operator on a partitioned grid as a PETSc matrix, assembled from a few products J v."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from petsc4py import PETSc

from pnode_dist.partition.colouring import NONE, Integers, colour_grid
from pnode_dist.partition.grid import GridPartition
from pnode_dist.petsc import calls, vectors

Product = Callable[[torch.Tensor], torch.Tensor]


class StencilJacobian:
    """The matrix `shift` M - J, with the Jacobian J of a function f of a grid's state. Collective on the partition.

    The state of a rank is `shape = [*leading, *local, channels]`, by default the partition's `local_shape`, one
    contiguous block in the state's Vec; leading axes and channels are the same on all ranks. f at a point may depend
    on all channels of the same sample within `width`, one number or one for each axis, in the directions of all axes,
    around the end of a periodic axis. `width` may exceed blocks and grid.

    `matrix` is a PETSc AIJ Mat of block size `channels` in the Vec's numbering; its nonzero pattern is made once and
    its values belong to the last `assemble`. `products` is the number of J v that one takes: colours times channels,
    with the samples side by side in each.
    Raises `ConfigurationError` for a negative width and `ValueError` for a shape that is not the partition's.
    """

    def __init__(
        self, partition: GridPartition, width: int | Sequence[int], shape: Sequence[int] | None = None
    ) -> None:
        self.partition = partition
        self.shape = partition.local_shape if shape is None else tuple(shape)
        own = partition.local_shape[:-1]
        leading = len(self.shape) - len(own) - 1
        if leading < 0 or self.shape[leading:-1] != own:
            raise ValueError(
                f"stencil Jacobian: got a state of shape {self.shape}, this rank owns [..., "
                f"{', '.join(map(str, own))}, channels]"
            )
        self._samples, self._channels = math.prod(self.shape[:leading]), self.shape[-1]
        self._field = (self._samples, *self.shape[leading:])
        self._size = math.prod(self.shape)
        self.colouring = colour_grid(partition.shape, width, partition.boundary)
        self.products = self.colouring.count * self._channels
        self._colours = [
            torch.from_numpy(axis.colour[slice(*owned)]).view(_along(number, len(own)))
            for number, (axis, owned) in enumerate(zip(self.colouring.axes, partition.owned, strict=True))
        ]
        self._diagonal = self._own_entries()
        self.matrix = self._preallocated()

    def _own_entries(self) -> torch.Tensor:
        """Return the positions of the diagonal entries in the values."""
        colour = torch.zeros((), dtype=torch.int64)
        for axis, own in zip(self.colouring.axes, self._colours, strict=True):
            colour = colour * axis.count + own
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
        calls.preallocate_coordinates(matrix, np.broadcast_to(rows, columns.shape).reshape(-1), columns.reshape(-1))
        return matrix

    def _columns(self, blocks: _Blocks) -> Integers:
        """Return `[products, rows]`: the column of each row in a product, or `NONE`, which PETSc skips."""
        axes = len(self.partition.shape)
        columns = np.empty((self.products, *self._field), dtype=PETSc.IntType)
        sample = np.arange(self._samples).reshape(_along(0, axes + 1))
        sources = [
            axis.source[slice(*owned)].T for axis, owned in zip(self.colouring.axes, self.partition.owned, strict=True)
        ]
        for number, colour in enumerate(self.colouring.colours()):
            point, missing, places = sample, np.zeros((), dtype=bool), []
            for axis, (source, chosen, starts, lengths) in enumerate(
                zip(sources, colour, blocks.starts, blocks.lengths, strict=True)
            ):
                seen = source[chosen].reshape(_along(axis, axes))
                place = np.searchsorted(starts, seen, "right") - 1
                point = point * lengths[place] + (seen - starts[place])
                missing = missing | (seen == NONE)
                places.append(place)
            entry = blocks.first[tuple(places)] + point * self._channels
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
        for colour in self.colouring.colours():
            points = torch.ones((), dtype=torch.bool)
            for own, chosen in zip(self._colours, colour, strict=True):
                points = points & (own == chosen)
            for channel in range(self._channels):
                seed = torch.zeros(self._size, dtype=torch.float64)
                seed.view(self._field)[..., channel] = points.double()
                torch.neg(self._checked(jvp(seed)), out=values[number])
                number += 1
        on_diagonal = torch.full((self._size,), shift, dtype=torch.float64) if mass is None else shift * mass.double()
        values.view(-1)[self._diagonal] += on_diagonal
        calls.set_coordinate_values(self.matrix, values.numpy().reshape(-1))
        return self.matrix

    def missed(self, jvp: Product, shift: float, mass: torch.Tensor | None = None) -> float:
        """Return the relative error of the stencil: |(J - J') r| / |J r| with J' the J of `matrix`, for a random r.

        For the arguments of the last `assemble` this is rounding error if `width` is at least the reach of f. Takes one
        product. Collective on the partition's communicator, and the same on all ranks.
        """
        comm = self.partition.comm
        r = torch.randn(self._size, generator=torch.Generator().manual_seed(comm.rank), dtype=torch.float64)
        probe, image = self.matrix.createVecs()
        vectors.view(probe, (self._size,)).copy_(r)
        probe.stateIncrease()
        self.matrix.mult(probe, image)
        wanted = self._checked(jvp(r))
        assembled = shift * (r if mass is None else mass * r) - vectors.view(image, (self._size,))
        ours = np.array([float((wanted - assembled).square().sum()), float(wanted.square().sum())])
        difference, whole = (math.sqrt(total) for total in comm.allreduce(ours))
        return difference / whole if whole > 0 else difference

    def _checked(self, image: torch.Tensor) -> torch.Tensor:
        if tuple(image.shape) != (self._size,):
            raise ValueError(f"stencil Jacobian: J v has shape {tuple(image.shape)}, the state {self._size} entries")
        return image.detach().double()


@dataclass(frozen=True)
class _Blocks:
    """The blocks of all ranks: where they start along each axis, how long they are, and their first entries in the
    Vec, by their places in the process grid."""

    starts: tuple[Integers, ...]
    lengths: tuple[Integers, ...]
    first: Integers


def _blocks(partition: GridPartition, entries_per_point: int) -> _Blocks:
    ranges = [np.array(along, dtype=np.int64) for along in partition.ranges]
    starts, lengths = (tuple(along[:, 0] for along in ranges), tuple(along[:, 1] - along[:, 0] for along in ranges))
    sizes = np.array(entries_per_point, dtype=np.int64)
    for along in lengths:
        sizes = sizes[..., None] * along
    return _Blocks(starts, lengths, (np.cumsum(sizes) - sizes.reshape(-1)).reshape(sizes.shape))


def _along(axis: int, axes: int) -> tuple[int, ...]:
    """The shape of what varies along one of so many axes."""
    return (*[1] * axis, -1, *[1] * (axes - axis - 1))
