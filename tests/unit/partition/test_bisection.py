"""Parts of a graph: of equal size, the same every time, with fewer edges between them than ranges of numbers have."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.spatial import Delaunay

from pnode_dist.partition.bisection import adjacency, bisected
from pnode_dist.partition.protocol import even_ranges
from tests.oracles.graphs import grid_edges, random_edges

PARTS = [1, 2, 3, 4, 7]


def cut(edges: npt.NDArray[np.int64], part: npt.NDArray[np.int64]) -> int:
    return int((part[edges[0]] != part[edges[1]]).sum())


def contiguous(nodes: int, parts: int) -> npt.NDArray[np.int64]:
    return np.repeat(np.arange(parts), [stop - start for start, stop in even_ranges(nodes, parts)])


@pytest.fixture(scope="module")
def mesh() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The edges of a triangulation of random points, which are numbered in no order, and the points."""
    points = np.random.default_rng(0).random((600, 2))
    corners = Delaunay(points).simplices
    pairs = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [0, 2]]])
    return np.unique(np.sort(pairs, axis=1), axis=0).T.astype(np.int64), points


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("nodes", [1, 2, 5, 30])
def test_sizes_differ_by_at_most_one_larger_ones_first(nodes: int, parts: int) -> None:
    for edges in (0, 2 * nodes):
        part = bisected(adjacency(random_edges(nodes, edges).numpy(), nodes), parts)
        sizes = np.bincount(part, minlength=parts)
        assert len(part) == nodes
        assert sizes.tolist() == [stop - start for start, stop in even_ranges(nodes, parts)]


def test_a_graph_of_two_halves_joined_by_one_edge_is_cut_there() -> None:
    # Complete graphs of 6 nodes, those of even and of odd number.
    pairs = [(a, b) for a in range(12) for b in range(a) if a % 2 == b % 2]
    part = bisected(adjacency(np.array([*pairs, (0, 1)]).T, 12), 2)
    assert len(set(part[::2])) == len(set(part[1::2])) == 1
    assert part[0] != part[1]


def test_components_stay_whole_where_that_is_even() -> None:
    blocks = [grid_edges(4, 3).numpy() + 12 * number for number in range(4)]
    shuffled = np.random.default_rng(1).permutation(48)
    edges = shuffled[np.concatenate(blocks, axis=1)]
    for parts in (2, 4):
        assert cut(edges, bisected(adjacency(edges, 48), parts)) == 0


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_an_irregular_mesh_is_cut_a_fifth_as_often_as_by_ranges_of_numbers(
    parts: int, mesh: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
) -> None:
    edges, points = mesh
    graph = adjacency(edges, len(points))
    found, with_places = bisected(graph, parts), bisected(graph, parts, points)
    assert max(cut(edges, found), cut(edges, with_places)) < 0.2 * cut(edges, contiguous(len(points), parts))
    np.testing.assert_array_equal(found, bisected(graph, parts))


def test_exchanging_nodes_lowers_the_cut_of_strips(
    mesh: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]],
) -> None:
    edges, points = mesh
    strips = np.empty(len(points), dtype=np.int64)
    strips[np.argsort(points[:, np.ptp(points, axis=0).argmax()])] = contiguous(len(points), 2)
    assert cut(edges, bisected(adjacency(edges, len(points)), 2, points)) < cut(edges, strips)


def test_weights_count_edges_in_both_directions_without_loops() -> None:
    graph = adjacency(np.array([[0, 1, 1, 2], [1, 0, 1, 1]]), 4)
    assert graph.first.tolist() == [0, 1, 3, 4, 4]
    assert graph.neighbours.tolist() == [1, 0, 2, 1]
    assert graph.weights.tolist() == [2, 2, 1, 1]
