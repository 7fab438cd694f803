"""Recursive bisection of a graph into parts of equal size with few edges between them.

A bisection starts from the distances to the two ends of the graph, found by breadth-first searches (A. George, J. W. H.
Liu: An implementation of a pseudoperipheral node finder, ACM Trans. Math. Softw. 5 (1979)), or from coordinates where
they are known, and is improved by exchanging nodes (B. W. Kernighan, S. Lin, Bell Syst. Tech. J. 49 (1970); C. M.
Fiduccia, R. M. Mattheyses, 19th Design Automation Conference (1982)). It is the same for the same graph, everywhere.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pnode_dist.partition.protocol import Integers, even_ranges

Reals = npt.NDArray[np.float64]

_PASSES = 10
_PATIENCE = 100
_SEARCHES = 4
_AVERAGES = 50


@dataclass(frozen=True)
class Adjacency:
    """An undirected graph, without loops.

    The neighbours of node v are `neighbours[first[v] : first[v + 1]]`, and `weights` has the weights of these edges.
    """

    first: Integers
    neighbours: Integers
    weights: Integers

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return len(self.first) - 1


def adjacency(edge_index: Integers, nodes: int) -> Adjacency:
    """Return the undirected graph of the edges. A weight is the number of edges between two nodes. Ignores loops."""
    source, target = edge_index[:, edge_index[0] != edge_index[1]]
    pairs = np.concatenate([source * nodes + target, target * nodes + source])
    joined, weights = np.unique(pairs, return_counts=True)
    rows, columns = np.divmod(joined, nodes)
    first = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=nodes))])
    return Adjacency(first, columns, weights)


def bisected(graph: Adjacency, parts: int, coordinates: Reals | None = None) -> Integers:
    """Return the part 0 ... `parts` - 1 of each node. Sizes differ by at most one, larger ones first.

    `coordinates` are `[nodes, dimensions]`.
    """
    sizes = [stop - start for start, stop in even_ranges(graph.nodes, parts)]
    part = np.zeros(graph.nodes, dtype=np.int64)
    waiting = [(np.arange(graph.nodes), 0, parts)]
    while waiting:
        members, first, count = waiting.pop()
        if count == 1 or len(members) == 0:
            part[members] = first
            continue
        half = count // 2
        # For an odd number the larger half gets the larger parts.
        half = count - half
        size = sum(sizes[first : first + half])
        inner = _induced(graph, members)
        order = _between_ends(inner) if coordinates is None else _along_longest_axis(coordinates[members])
        left = np.zeros(len(members), dtype=bool)
        left[order[:size]] = True
        _improve(inner, left)
        waiting.append((members[left], first, half))
        waiting.append((members[~left], first + half, count - half))
    return part


def _induced(graph: Adjacency, members: Integers) -> Adjacency:
    """Return the subgraph of the ascending `members`, numbered in their order."""
    if len(members) == graph.nodes:
        return graph
    number = np.full(graph.nodes, -1, dtype=np.int64)
    number[members] = np.arange(len(members))
    entries, degrees = _entries(graph, members)
    neighbours = number[graph.neighbours[entries]]
    inside = neighbours >= 0
    rows = np.repeat(np.arange(len(members)), degrees)[inside]
    first = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(members)))])
    return Adjacency(first, neighbours[inside], graph.weights[entries][inside])


def _entries(graph: Adjacency, nodes: Integers) -> tuple[Integers, Integers]:
    """Return the positions of the neighbours of `nodes`, node after node, and the number of each node's."""
    starts, degrees = graph.first[nodes], graph.first[nodes + 1] - graph.first[nodes]
    before = np.cumsum(degrees) - degrees
    return np.arange(degrees.sum()) + np.repeat(starts - before, degrees), degrees


def _between_ends(graph: Adjacency) -> Integers:
    """Return all nodes, component after component, each in order from one of its ends to the other.

    The position of a node is the difference of its distances to both ends. Averaging with the neighbours approaches the
    eigenvector of spectral bisection, and smooths the lines of equal position.
    """
    component = _components(graph)
    end = np.flatnonzero(component == np.arange(graph.nodes))
    for _ in range(_SEARCHES):
        forth = _distances(graph, end)
        # The furthest node of each component comes first in it.
        order = np.lexsort((-forth, component))
        end = order[np.unique(component[order], return_index=True)[1]]
    place = (forth - _distances(graph, end)).astype(np.float64)
    rows, degrees = _rows(graph), np.maximum(np.diff(graph.first), 1)
    for _ in range(_AVERAGES):
        place = (place + np.bincount(rows, place[graph.neighbours], graph.nodes) / degrees) / 2
    return np.lexsort((place, component))


def _rows(graph: Adjacency) -> Integers:
    """Return the node of each entry of `neighbours`."""
    return np.repeat(np.arange(graph.nodes), np.diff(graph.first))


def _components(graph: Adjacency) -> Integers:
    """Return for each node the lowest number in its connected component."""
    component = np.arange(graph.nodes)
    joined = np.flatnonzero(np.diff(graph.first))
    while True:
        lowest = component.copy()
        if len(joined) > 0:
            around = np.minimum.reduceat(component[graph.neighbours], graph.first[joined])
            lowest[joined] = np.minimum(component[joined], around)
        lowest = lowest[lowest]
        if np.array_equal(lowest, component):
            return component
        component = lowest


def _distances(graph: Adjacency, starts: Integers) -> Integers:
    """Return the distance of each node, in edges, to the nearest of `starts`, one in each component."""
    distance = np.full(graph.nodes, -1, dtype=np.int64)
    level, away = starts, 0
    while len(level) > 0:
        distance[level] = away
        found = graph.neighbours[_entries(graph, level)[0]]
        level, away = np.unique(found[distance[found] < 0]), away + 1
    return distance


def _along_longest_axis(coordinates: Reals) -> Integers:
    """Return all nodes in the order of their coordinate along the axis of largest extent."""
    axis = int(np.argmax(np.ptp(coordinates, axis=0)))
    return np.argsort(coordinates[:, axis], kind="stable")


def _improve(graph: Adjacency, left: npt.NDArray[np.bool_]) -> None:
    """Exchange nodes between the two sides, in place, as long as that lowers the weight of the edges between them.

    In a pass every node moves at most once. The best nodes of both sides move in turn, also if that raises the weight.
    Moves after the best state are undone.
    """
    if left.all() or not left.any():
        return
    first, neighbours, weights = graph.first.tolist(), graph.neighbours.tolist(), graph.weights.tolist()
    for _ in range(_PASSES):
        rows = _rows(graph)
        across = left[rows] != left[graph.neighbours]
        gain = np.bincount(rows, np.where(across, graph.weights, -graph.weights), graph.nodes).astype(np.int64).tolist()
        side = left.tolist()
        moved: set[int] = set()
        at_edge = np.unique(rows[across]).tolist()
        heaps: dict[bool, list[tuple[int, int]]] = {
            which: [(-gain[node], node) for node in at_edge if side[node] == which] for which in (True, False)
        }
        for heap in heaps.values():
            heapq.heapify(heap)
        moves: list[int] = []
        total = best = kept = 0
        while len(moves) - kept < 2 * _PATIENCE:
            pair = []
            for which in (True, False):
                node = _best(heaps[which], gain, side, moved, which)
                if node is None:
                    break
                pair.append(node)
                moved.add(node)
                total += gain[node]
                side[node] = not which
                for entry in range(first[node], first[node + 1]):
                    other = neighbours[entry]
                    gain[other] += 2 * weights[entry] if side[other] == which else -2 * weights[entry]
                    if other not in moved:
                        heapq.heappush(heaps[side[other]], (-gain[other], other))
            if len(pair) < 2:
                break
            moves += pair
            if total > best:
                best, kept = total, len(moves)
        if kept == 0:
            return
        exchanged = np.array(moves[:kept])
        left[exchanged] = ~left[exchanged]


def _best(heap: list[tuple[int, int]], gain: list[int], side: list[bool], moved: set[int], which: bool) -> int | None:
    """Pop the node of the highest gain from the heap of a side. Drops outdated entries."""
    while heap:
        negative, node = heapq.heappop(heap)
        if node not in moved and side[node] == which and gain[node] == -negative:
            return node
    return None
