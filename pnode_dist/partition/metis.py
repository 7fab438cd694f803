"""Parts of a graph by METIS, through the optional package pymetis."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.bisection import Adjacency
from pnode_dist.partition.protocol import Integers

# METIS draws random numbers, and gives the same parts for the same seed.
_SEED = 0


def has_metis() -> bool:
    """Return True if pymetis is installed here."""
    return find_spec("pymetis") is not None


def by_metis(graph: Adjacency, parts: int) -> Integers:
    """Return the part 0 ... `parts` - 1 of each node, by METIS's recursive bisection with several levels.

    Sizes differ by about a thousandth. The same graph has the same parts. Raises `ConfigurationError` without pymetis.
    """
    if not has_metis():
        raise ConfigurationError("ownership = 'metis': needs the package pymetis: install pnode-dist[graph]")
    import pymetis

    found = pymetis.part_graph(
        parts,
        adjacency=pymetis.CSRAdjacency(graph.first.astype(np.int64), graph.neighbours.astype(np.int64)),
        eweights=graph.weights.astype(np.int64),
        recursive=True,
        options=pymetis.Options(seed=_SEED),
    )
    return np.asarray(found.vertex_part, dtype=np.int64)
