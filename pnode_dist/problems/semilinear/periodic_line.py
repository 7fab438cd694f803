"""Partitioned periodic line of equally spaced points, and its difference operators as PETSc matrices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition import protocol
from pnode_dist.partition.grid import GridPartition

Stencil = Mapping[int, float]
"""A constant-coefficient difference operator: maps the offset of a point to its weight."""


def line(mesh: Mesh | MPI.Comm, points: int, width: int = 1) -> GridPartition:
    """Partition a periodic line of `points` points, with one value per point. Collective on the state ranks.

    Local states are `[..., points_local, 1]`. `width` is the widest halo that exchanges may use.
    Raises `ConfigurationError` if a rank would own fewer than `width` points.
    """
    ranks = protocol.communicator(mesh).size
    if points // ranks < width:
        raise ConfigurationError(
            f"a line of {points} points cannot be split over {ranks} rank(s) with {width} or more points each (the "
            f"width of the halo): use at most {points // width} rank(s)"
        )
    return GridPartition(mesh, (points,), 1, "periodic", width)


def first_difference(spacing: float) -> Stencil:
    """Return the central difference of the first derivative, of second order in the spacing."""
    return {-1: -0.5 / spacing, 1: 0.5 / spacing}


def second_difference(spacing: float) -> Stencil:
    """Return the central difference of the second derivative, of second order in the spacing."""
    return {offset: weight / spacing**2 for offset, weight in ((-1, 1.0), (0, -2.0), (1, 1.0))}


def fourth_difference(spacing: float) -> Stencil:
    """Return the central difference of the fourth derivative, of second order in the spacing.

    It is the second difference applied twice.
    """
    weights = ((-2, 1.0), (-1, -4.0), (0, 6.0), (1, -4.0), (2, 1.0))
    return {offset: weight / spacing**4 for offset, weight in weights}


def combined(*terms: tuple[float, Stencil]) -> Stencil:
    """Return a linear combination of stencils, from pairs of coefficient and stencil."""
    offsets = sorted({offset for _, stencil in terms for offset in stencil})
    return {offset: sum(factor * stencil.get(offset, 0.0) for factor, stencil in terms) for offset in offsets}


def shortest_wave(stencil: Stencil) -> float:
    """Return the eigenvalue of the stencil for the shortest wave of the grid, +1 and -1 in turn."""
    return sum(-weight if offset % 2 else weight for offset, weight in stencil.items())


def operator(partition: GridPartition, stencil: Stencil, samples: int = 1) -> PETSc.Mat:
    """Assemble the matrix that applies the stencil to each of `samples` states of the line.

    The matrix acts on Vecs whose local part is `[sample, points_local, 1]`, and does not couple samples. Collective on
    the partition's communicator. Raises `ConfigurationError` if the line has fewer points than the stencil spans.
    """
    (points,) = partition.shape
    reach = max(abs(offset) for offset in stencil)
    if points < 2 * reach + 1:
        raise ConfigurationError(f"a stencil of {2 * reach + 1} points needs as many, and the line has {points}")
    columns = _numbering(partition, samples)
    ((first, last),) = partition.owned
    offsets = np.array(sorted(stencil))
    reached = columns[:, (np.arange(first, last)[:, None] + offsets) % points].reshape(-1, len(offsets))
    weights = np.broadcast_to([stencil[offset] for offset in offsets], reached.shape)
    # PETSc requires the columns of a row in ascending order, which periodic wrapping breaks.
    order = np.argsort(reached, axis=1)
    rows = np.arange(len(reached) + 1) * len(offsets)
    size = (len(reached), samples * points)
    values = (
        rows.astype(PETSc.IntType),
        np.take_along_axis(reached, order, axis=1).ravel().astype(PETSc.IntType),
        np.take_along_axis(weights, order, axis=1).ravel().astype(PETSc.ScalarType),
    )
    return PETSc.Mat().createAIJ((size, size), csr=values, comm=partition.comm)


def _numbering(partition: GridPartition, samples: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return the global Vec index of every value `[sample, point]`.

    The Vec orders values by rank, and within a rank by sample.
    """
    numbers = np.empty((samples, partition.shape[0]), dtype=np.int64)
    for rank in range(partition.comm.size):
        owned = partition.owned_slices(rank)[0]
        width = owned.stop - owned.start
        block = samples * owned.start + np.arange(samples * width).reshape(samples, width)
        numbers[:, owned] = block
    return numbers
