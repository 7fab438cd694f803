"""METIS cuts fewer edges than our own bisection, gives the same parts every time, and is asked for by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from scipy.spatial import Delaunay

from pnode_dist import ConfigurationError, GraphPartition
from pnode_dist.partition import metis, ownership
from pnode_dist.partition.bisection import Adjacency, adjacency, bisected
from tests.oracles.graphs import random_edges

needs_metis = pytest.mark.skipif(not metis.has_metis(), reason="pymetis is not installed")


def triangulation(nodes: int) -> np.ndarray[Any, Any]:
    corners = Delaunay(np.random.default_rng(0).random((nodes, 2))).simplices
    pairs = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [0, 2]]])
    return np.unique(np.sort(pairs, axis=1), axis=0).T.astype(np.int64)


def cut(edges: np.ndarray[Any, Any], part: np.ndarray[Any, Any]) -> int:
    return int((part[edges[0]] != part[edges[1]]).sum())


@needs_metis
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_an_irregular_mesh_is_cut_less_than_by_bisection(parts: int) -> None:
    edges = triangulation(2000)
    graph = adjacency(edges, 2000)
    found = metis.by_metis(graph, parts)
    assert cut(edges, found) < cut(edges, bisected(graph, parts))
    sizes = np.bincount(found, minlength=parts)
    assert sizes.max() - sizes.min() <= 0.01 * 2000 / parts + 1
    np.testing.assert_array_equal(found, metis.by_metis(graph, parts))


@needs_metis
@pytest.mark.parametrize(("nodes", "edges", "parts"), [(1, 1, 3), (5, 0, 7), (30, 0, 4), (8, 6, 7), (12, 40, 3)])
def test_small_graphs_and_graphs_without_edges_have_parts_too(nodes: int, edges: int, parts: int) -> None:
    found = metis.by_metis(adjacency(random_edges(nodes, edges).numpy(), nodes), parts)
    assert found.shape == (nodes,)
    assert set(found) <= set(range(parts))


def test_metis_without_its_package_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (metis, ownership):
        monkeypatch.setattr(module, "has_metis", lambda: False)
    with pytest.raises(ConfigurationError, match=r"'metis': needs the package pymetis: install pnode-dist\[graph\]"):
        GraphPartition(MPI.COMM_SELF, random_edges(5, 9), 5, ownership="metis")
    assert "metis" not in ownership.available()
    assert GraphPartition(MPI.COMM_SELF, random_edges(5, 9), 5, ownership="auto").owned.tolist() == list(range(5))


@pytest.mark.parametrize("installed", [True, False])
def test_auto_is_metis_where_it_is_installed(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def halves(name: str) -> Any:
        def split(graph: Adjacency, parts: int, places: Any = None) -> np.ndarray[Any, Any]:
            asked.append(name)
            return np.arange(graph.nodes) % parts

        return split

    class Two(MPI.Intracomm):
        """Rank 0 of two, as the choice sees it."""

        size = 2

        def bcast(self, obj: Any = None, root: int = 0) -> Any:
            return obj

    monkeypatch.setattr(ownership, "has_metis", lambda: installed)
    monkeypatch.setattr(ownership, "by_metis", halves("metis"))
    monkeypatch.setattr(ownership, "bisected", halves("bisection"))
    owner = ownership.owners(Two(MPI.COMM_SELF), random_edges(6, 9).numpy(), 6, "auto")
    assert owner.tolist() == [0, 1, 0, 1, 0, 1]
    assert asked == ["metis" if installed else "bisection"]
