"""The irregular mesh: its points keep their distance, and its edges are those of the Gabriel graph."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pnode_dist.partition.bisection import adjacency
from pnode_dist.problems.graph_diffusion.mesh import irregular_mesh


@pytest.mark.parametrize("nodes", [4, 15, 70])
def test_neighbours_have_no_other_point_in_the_circle_between_them(nodes: int) -> None:
    mesh = irregular_mesh(nodes, 3)
    expected = set()
    for a in range(nodes):
        for b in range(nodes):
            centre = (mesh.points[a] + mesh.points[b]) / 2
            radius = math.dist(mesh.points[a], centre)
            others = [k for k in range(nodes) if k not in (a, b)]
            if a != b and all(math.dist(mesh.points[k], centre) > radius for k in others):
                expected.add((a, b))
    assert {(int(a), int(b)) for a, b in mesh.edge_index.T} == expected
    assert len(expected) == mesh.edge_index.shape[1]
    np.testing.assert_allclose(mesh.lengths, [math.dist(*mesh.points[list(ends)]) for ends in mesh.edge_index.T])


def test_points_are_in_the_unit_square_apart_and_connected() -> None:
    mesh = irregular_mesh(200, 0)
    assert mesh.points.min() >= 0
    assert mesh.points.max() <= 1
    distances = np.linalg.norm(mesh.points[:, None] - mesh.points, axis=-1) + np.diag(np.full(200, np.inf))
    assert distances.min() >= 0.65 / math.sqrt(200)
    graph, reached = adjacency(mesh.edge_index, 200), {0}
    waiting = [0]
    while waiting:
        node = waiting.pop()
        new = set(graph.neighbours[graph.first[node] : graph.first[node + 1]].tolist()) - reached
        reached |= new
        waiting += new
    assert len(reached) == 200


def test_the_seed_chooses_the_mesh() -> None:
    assert np.array_equal(irregular_mesh(30, 1).points, irregular_mesh(30, 1).points)
    assert not np.array_equal(irregular_mesh(30, 1).points, irregular_mesh(30, 2).points)
