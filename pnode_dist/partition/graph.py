"""The partition of a graph or an irregular mesh: nodes with their incoming edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition import protocol
from pnode_dist.partition.ownership import owners
from pnode_dist.partition.protocol import Integers
from pnode_dist.petsc import vectors


@dataclass(frozen=True)
class Sent:
    """The nodes of this rank, by local number, that are ghosts of the neighbour `rank`."""

    rank: int
    nodes: torch.Tensor


@dataclass(frozen=True)
class Received:
    """The range of this rank's ghosts that the neighbour `rank` owns."""

    rank: int
    start: int
    stop: int


class GraphPartition:
    """A graph of `nodes` nodes with `features` values each, and directed edges. Collective on the state ranks.

    `edge_index` `[2, edges]` holds the source and the target of each edge, as in torch_geometric. It is an array or
    tensor of integers on rank 0 of the state ranks, and ignored elsewhere. A rank holds the edges whose targets it
    owns. The sources of these edges that other ranks own are its ghosts.

    `ownership` is one of
    - `bisection`: equal shares with few edges between them; with `coordinates` `[nodes, dimensions]` also compact;
    - `metis`: nearly equal shares with fewer edges between them, by METIS. Needs the package pymetis on rank 0, which
      `pip install pnode-dist[graph]` installs. `coordinates` are not used;
    - `auto`: `metis` where pymetis is installed, else `bisection`. The owners then differ between machines;
    - `contiguous`: equal ranges of node numbers;
    - an array on rank 0 with the owner rank of each node;
    - a type of PETSc's MatPartitioning that this PETSc was built with.
    A rank may own nothing.

    Local states are `[..., local_nodes, features]` with any number of leading batch axes, and with the nodes in
    ascending order.
    - `owned`: the numbers of this rank's nodes.
    - `ghosts`: the numbers of its ghosts, ordered by owner.
    - `edges`: the numbers of its edges in `edge_index`, in ascending order.
    - `sources`, `targets`: the ends of its edges as local numbers, own nodes first, then ghosts.
    - `sent`, `received`: the exchanges with each neighbour, in the order of ranks.
    - `edge_cut`: the number of edges between ranks.

    Raises `ConfigurationError` on all ranks for edges with invalid nodes, and for an unknown ownership.
    """

    def __init__(
        self,
        mesh: Mesh | MPI.Comm,
        edge_index: npt.ArrayLike | torch.Tensor | None,
        nodes: int,
        features: int = 1,
        ownership: str | npt.ArrayLike | torch.Tensor = "bisection",
        coordinates: npt.ArrayLike | torch.Tensor | None = None,
    ) -> None:
        if nodes < 1 or features < 1:
            raise ConfigurationError(f"graph: nodes = {nodes}, features = {features}: must be at least 1")
        self.comm = protocol.communicator(mesh)
        self.features = features
        ends = _checked_edges(edge_index, nodes, self.comm)
        owner = owners(self.comm, ends, nodes, ownership, coordinates)
        # The nodes of all ranks: any rank may be the root of a scatter.
        self._owned = np.split(
            np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner, minlength=self.comm.size))
        )
        self.owned: Integers = self._owned[self.comm.rank]
        self.global_shape = (nodes, features)
        self.local_shape = (len(self.owned), features)

        self.edges, source, target = _handed_out(ends, owner, self.comm)
        foreign = owner[source] != self.comm.rank
        ghosts = np.unique(source[foreign])
        self.ghosts: Integers = ghosts[np.argsort(owner[ghosts], kind="stable")]
        self.received, self.sent = _neighbours(self.owned, self.ghosts, owner, self.comm)
        self.targets = torch.from_numpy(np.searchsorted(self.owned, target))
        self.sources = torch.from_numpy(_local_numbers(source, self.owned, self.ghosts, nodes))
        self.global_edges, self.edge_cut = (
            int(total) for total in self.comm.allreduce(np.array([len(self.edges), foreign.sum()]))
        )

    def owned_slices(self, rank: int) -> protocol.Index:
        """Return the part of the global `[nodes, features]` array that `rank` owns: its nodes, all features."""
        return (self._owned[rank], slice(0, self.features))

    def create_vec(self) -> PETSc.Vec:
        """Create a zero Vec with the layout of the partition. Collective on the state ranks."""
        return vectors.create_vec(self.comm, protocol.count(self.local_shape))

    def view(self, vec: PETSc.Vec) -> torch.Tensor:
        """Return this rank's part of `vec` as a tensor of `local_shape`, without a copy."""
        return vectors.view(vec, self.local_shape)

    def scatter(self, source: Any, root: int = 0) -> torch.Tensor:
        """Distribute a global array from `root`. Collective on the state ranks. See `protocol.scatter`."""
        return protocol.scatter(source, self, root)

    def gather(self, local: torch.Tensor, root: int = 0) -> torch.Tensor | None:
        """Return the global array on `root`, None elsewhere. Collective on the state ranks."""
        return protocol.gather(local, self, root)

    def scatter_edges(self, source: Any, root: int = 0) -> torch.Tensor:
        """Distribute edge attributes from `root`: return those of this rank's edges. Collective on the state ranks.

        `source` is an array or tensor `[edges]` or `[..., edges, attributes]` on `root`, in the order of `edge_index`.
        """
        shape = self.comm.bcast(tuple(source.shape) if self.comm.rank == root else None, root=root)
        attributes = shape[-1:] if len(shape) > 1 else ()
        rows = _EdgeRows(
            self.comm,
            (self.global_edges, *attributes),
            (len(self.edges), *attributes),
            self.comm.gather(self.edges, root=root) or [],
        )
        return protocol.scatter(source, rows, root)


@dataclass(frozen=True)
class _EdgeRows:
    """The partition of a table with one row for each edge. `owned` is complete on the root alone."""

    comm: MPI.Comm
    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    owned: list[Integers]

    def owned_slices(self, rank: int) -> protocol.Index:
        """Return the rows of the edges that `rank` holds."""
        return (self.owned[rank], *(slice(0, extent) for extent in self.global_shape[1:]))


def _checked_edges(edge_index: Any, nodes: int, comm: MPI.Comm) -> Integers | None:
    """Check the edges, and return them as an array on rank 0, None elsewhere."""
    ends: Integers | None = None
    failure: str | None = None
    if comm.rank == 0:
        given = np.asarray(edge_index)
        if given.ndim != 2 or len(given) != 2 or given.dtype.kind not in "iu":
            failure = f"an array of shape {given.shape} and type {given.dtype}: must be [2, edges] of integers"
        elif given.size and not (given.min() >= 0 and given.max() < nodes):
            failure = f"nodes from {given.min()} to {given.max()}: must be from 0 to {nodes - 1}"
        else:
            ends = given.astype(np.int64)
    failure = comm.bcast(failure)
    if failure is not None:
        raise ConfigurationError(f"edge_index: {failure}")
    return ends


def _handed_out(ends: Integers | None, owner: Integers, comm: MPI.Comm) -> tuple[Integers, Integers, Integers]:
    """Distribute the edges to the owners of their targets: return numbers, sources and targets of this rank's."""
    counts: Any = None
    rows: list[Integers | None] = [None] * 3
    if ends is not None:
        holder = owner[ends[1]]
        counts = np.bincount(holder, minlength=comm.size)
        order = np.argsort(holder, kind="stable")
        rows = [order, *(end[order] for end in ends)]
    counts = comm.bcast(counts)
    own: list[Integers] = []
    for row in rows:
        part = np.empty(counts[comm.rank], dtype=np.int64)
        comm.Scatterv(None if row is None else [row, counts], part)
        own.append(part)
    return own[0], own[1], own[2]


def _neighbours(
    owned: Integers, ghosts: Integers, owner: Integers, comm: MPI.Comm
) -> tuple[tuple[Received, ...], tuple[Sent, ...]]:
    """Return the ghosts received from and the nodes sent to each neighbour. `ghosts` are ordered by owner."""
    bounds = np.searchsorted(owner[ghosts], np.arange(comm.size + 1))
    received = tuple(
        Received(rank, int(bounds[rank]), int(bounds[rank + 1]))
        for rank in range(comm.size)
        if bounds[rank] < bounds[rank + 1]
    )
    wanted = comm.alltoall([ghosts[bounds[rank] : bounds[rank + 1]] for rank in range(comm.size)])
    sent = tuple(
        Sent(rank, torch.from_numpy(np.searchsorted(owned, nodes))) for rank, nodes in enumerate(wanted) if len(nodes)
    )
    return received, sent


def _local_numbers(nodes: Integers, owned: Integers, ghosts: Integers, count: int) -> Integers:
    number = np.empty(count, dtype=np.int64)
    number[owned] = np.arange(len(owned))
    number[ghosts] = len(owned) + np.arange(len(ghosts))
    return number[nodes]
