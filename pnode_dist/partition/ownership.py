"""The owner ranks of the nodes of a graph: given, in even ranges, or by a partitioner."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.bisection import Adjacency, adjacency, bisected
from pnode_dist.partition.metis import by_metis, has_metis
from pnode_dist.partition.protocol import Integers, even_ranges

OWN = ("bisection", "contiguous", "auto")
_PETSC = ("parmetis", "ptscotch", "chaco", "party", "hierarch", "square", "average", "current")


def available() -> tuple[str, ...]:
    """Return the names of partitioners: pnode_dist's own, METIS, then the types of MatPartitioning in this PETSc.

    Not collective.
    """
    found = [*OWN, *(("metis",) if has_metis() else ())]
    partitioning = PETSc.MatPartitioning().create(comm=MPI.COMM_SELF)
    for name in _PETSC:
        try:
            partitioning.setType(name)
        except PETSc.Error:
            continue
        found.append(name)
    partitioning.destroy()
    return tuple(found)


def owners(
    comm: MPI.Comm,
    edge_index: Integers | None,
    nodes: int,
    ownership: str | npt.ArrayLike,
    coordinates: npt.ArrayLike | None = None,
) -> Integers:
    """Return the owner rank of each node, on every rank. Collective on `comm`.

    `edge_index` and `coordinates` are those of rank 0, and so is an `ownership` that is not a name. Rank 0 computes the
    owners. Raises `ConfigurationError` on all ranks for an unknown name, for owners that are no ranks, for `metis`
    without pymetis on rank 0, and where PETSc's partitioner refuses.
    """
    name = comm.bcast(ownership if isinstance(ownership, str) else None)
    graph: Adjacency | None = None
    owner: Any = None
    failure: str | None = None
    if comm.rank == 0:
        assert edge_index is not None
        try:
            places = _places(coordinates, nodes)
            if name is None:
                owner = _given(ownership, nodes, comm.size)
            elif name != "metis" and name not in available():
                failure = f"ownership = {name!r}: must be the owner of each node, or one of {', '.join(available())}"
            elif name == "contiguous" or (comm.size == 1 and (name != "metis" or has_metis())):
                lengths = [stop - start for start, stop in even_ranges(nodes, comm.size)]
                owner = np.repeat(np.arange(comm.size), lengths)
            else:
                graph = adjacency(edge_index, nodes)
                if name == "metis" or (name == "auto" and has_metis()):
                    owner = by_metis(graph, comm.size)
                elif name in OWN:
                    owner = bisected(graph, comm.size, places)
        except ConfigurationError as error:
            failure = str(error)
    failure, decided = comm.bcast((failure, owner is not None))
    if failure is not None:
        raise ConfigurationError(failure)
    if not decided:
        owner = _by_petsc(comm, graph, nodes, name)
    everywhere = np.empty(nodes, dtype=np.int64)
    if comm.rank == 0:
        everywhere[:] = owner
    comm.Bcast(everywhere)
    return everywhere


def _given(ownership: npt.ArrayLike, nodes: int, ranks: int) -> Integers:
    owner = np.asarray(ownership)
    if owner.shape != (nodes,) or owner.dtype.kind not in "iu":
        raise ConfigurationError(
            f"ownership: an array of shape {owner.shape} and type {owner.dtype}: must be one integer for each of the "
            f"{nodes} nodes"
        )
    if nodes and not (owner.min() >= 0 and owner.max() < ranks):
        raise ConfigurationError(
            f"ownership: owners from {owner.min()} to {owner.max()}: must be ranks from 0 to {ranks - 1}"
        )
    return owner.astype(np.int64)


def _places(coordinates: npt.ArrayLike | None, nodes: int) -> npt.NDArray[np.float64] | None:
    if coordinates is None:
        return None
    places = np.asarray(coordinates, dtype=np.float64)
    if places.ndim != 2 or len(places) != nodes or not np.isfinite(places).all():
        raise ConfigurationError(
            f"coordinates: an array of shape {places.shape}: must be finite and [{nodes}, dimensions], a row a node"
        )
    return places


def _by_petsc(comm: MPI.Comm, graph: Adjacency | None, nodes: int, name: str) -> Integers | None:
    """Return the owners by a MatPartitioning, on rank 0. Collective on `comm`."""
    ranges = even_ranges(nodes, comm.size)
    rows = comm.scatter(None if graph is None else [_csr(graph, *owned) for owned in ranges])
    start, stop = ranges[comm.rank]
    sizes = (stop - start, nodes)
    matrix = PETSc.Mat().createAIJ((sizes, sizes), csr=rows, comm=comm)
    partitioning = PETSc.MatPartitioning().create(comm=comm)
    part = PETSc.IS()
    try:
        partitioning.setAdjacency(matrix)
        partitioning.setType(name)
        partitioning.setFromOptions()
        partitioning.apply(part)
        parts = comm.gather(part.getIndices())
    except PETSc.Error as error:
        reason = str(error).strip().splitlines()[-1].partition("] ")[2]
        raise ConfigurationError(f"ownership = {name!r}: PETSc cannot split the graph with it: {reason}") from None
    finally:
        matrix.destroy()
        partitioning.destroy()
    return None if parts is None else np.concatenate(parts).astype(np.int64)


def _csr(graph: Adjacency, start: int, stop: int) -> tuple[Any, Any, Any]:
    first = graph.first[start : stop + 1]
    entries = slice(first[0], first[-1])
    return (
        (first - first[0]).astype(PETSc.IntType),
        graph.neighbours[entries].astype(PETSc.IntType),
        graph.weights[entries].astype(PETSc.ScalarType),
    )
