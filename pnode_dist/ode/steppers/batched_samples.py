"""The division of a state into the samples that are solved as a batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.mass import MassMatrix
from pnode_dist.partition.protocol import Partition
from pnode_dist.petsc import vectors


class Split(NamedTuple):
    """The division of this rank's state into samples: their number, and the components of each part in a sample."""

    samples: int
    widths: tuple[int, ...]


def split_of(layout: StateLayout, partition: Partition | None) -> Split:
    """Return the samples of a state: one for each index of the first axis, if all parts have the same first axis.

    Without a partition a single tensor of one axis is one sample, and so is a tuple of parts with other first axes.
    """
    shapes = layout.shapes
    alone = partition is None and len(shapes) == 1
    if all(len(shape) > alone for shape in shapes) and len({shape[0] for shape in shapes}) == 1:
        return Split(shapes[0][0], tuple(math.prod(shape[1:]) for shape in shapes))
    return Split(1, layout.sizes)


def parts_of(states: torch.Tensor, layout: StateLayout, widths: tuple[int, ...]) -> Parts:
    """Return the parts of a state `[sample, component]`."""
    if len(layout.shapes) == 1:
        return (states.reshape(layout.shapes[0]),)
    pieces = torch.split(states, list(widths), dim=1)
    return tuple(piece.reshape(shape) for piece, shape in zip(pieces, layout.shapes, strict=True))


def mass_blocks(mass: MassMatrix, layout: StateLayout, split: Split) -> torch.Tensor:
    """Return the blocks `[sample, row, column]` of a mass matrix that is made of tensors."""
    samples, widths = split
    columns = []
    for number, width in enumerate(widths):
        for component in range(width):
            unit = torch.zeros(layout.size, dtype=vectors.scalar_dtype())
            layout.parts(unit)[number].reshape(samples, width)[:, component] = 1.0
            product = layout.parts(mass.multiply(unit))
            columns.append(torch.cat([part.reshape(samples, w) for part, w in zip(product, widths, strict=True)], 1))
    return torch.stack(columns, dim=-1)
