"""Irregular mesh in the unit square: random points with a least distance, and the edges of their Gabriel graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Reals = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_LEAST_DISTANCE = 0.65
_NEAR = 10


@dataclass(frozen=True)
class IrregularMesh:
    """An irregular mesh in the unit square.

    `points` is `[nodes, 2]`, in random order. `edge_index` is `[2, edges]`, with both directions of every edge.
    """

    points: Reals
    edge_index: Integers

    @property
    def lengths(self) -> Reals:
        """The length of each edge."""
        source, target = self.edge_index
        lengths: Reals = np.linalg.norm(self.points[source] - self.points[target], axis=1)
        return lengths


def irregular_mesh(nodes: int, seed: int) -> IrregularMesh:
    """Generate the mesh of `nodes` nodes determined by `seed`. Not collective.

    Points are drawn uniformly and rejected if another point is nearer than 0.65 / sqrt(nodes). The edges are those of
    the Gabriel graph, which is connected (K. R. Gabriel, R. R. Sokal, Syst. Zool. 18 (1969)): two points are neighbours
    if no other point lies in the circle that has them at the ends of a diameter.
    """
    generator = np.random.default_rng(seed)
    points = np.empty((nodes, 2))
    count = 0
    while count < nodes:
        candidate = generator.random(2)
        if ((points[:count] - candidate) ** 2).sum(axis=1).min(initial=np.inf) * nodes >= _LEAST_DISTANCE**2:
            points[count] = candidate
            count += 1
    return IrregularMesh(points, _gabriel_graph(points))


def _gabriel_graph(points: Reals) -> Integers:
    squares = ((points[:, None] - points) ** 2).sum(axis=-1)
    # Thales: k lies in the circle of diameter ij if its squared distances to i and j add up to less than that of ij.
    np.fill_diagonal(squares, np.inf)
    pairs = []
    for node, row in enumerate(squares):
        near = np.argsort(row)[:_NEAR]
        # The nearest nodes exclude most candidates; test only the remaining ones against all nodes.
        left = np.flatnonzero((row[near, None] + squares[near]).min(axis=0) >= row)
        joined = left[(row + squares[left]).min(axis=1) >= row[left]]
        pairs.append(np.stack([np.full(len(joined), node), joined]))
    return np.concatenate(pairs, axis=1)
