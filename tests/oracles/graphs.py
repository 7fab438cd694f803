"""Graphs, and message passing on the whole of one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Message = Callable[..., torch.Tensor]


def random_edges(nodes: int, edges: int, seed: int = 0) -> torch.Tensor:
    """`[2, edges]` directed edges between any nodes but the last, loops and repeated ones among them."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, max(nodes - 1, 1), (2, edges)))


def grid_edges(rows: int, columns: int) -> torch.Tensor:
    """Both directions between neighbours of a grid, whose points are numbered row after row."""
    number = np.arange(rows * columns).reshape(rows, columns)
    along = [(number[:, :-1], number[:, 1:]), (number[:-1], number[1:])]
    pairs = np.concatenate([np.stack([a.ravel(), b.ravel()]) for a, b in along], axis=1)
    return torch.from_numpy(np.concatenate([pairs, pairs[::-1]], axis=1))


def aggregated(messages: torch.Tensor, targets: torch.Tensor, nodes: int, how: str) -> torch.Tensor:
    """`[..., edges, m]` -> `[..., nodes, m]`, node by node."""
    rows = []
    for node in range(nodes):
        own = messages[..., targets == node, :]
        if own.shape[-2] == 0:
            rows.append(messages.new_zeros(*messages.shape[:-2], messages.shape[-1]))
        else:
            rows.append({"sum": own.sum(-2), "mean": own.mean(-2), "max": own.amax(-2)}[how])
    return torch.stack(rows, dim=-2)


def passed(
    x: torch.Tensor, edges: torch.Tensor, message: Message, how: str, attributes: torch.Tensor | None = None
) -> torch.Tensor:
    """Message passing on a whole graph, `[..., nodes, features]` -> `[..., nodes, messages]`."""
    source, target = edges
    given = (x[..., target, :], x[..., source, :], *(() if attributes is None else (attributes,)))
    return aggregated(message(*given), target, x.shape[-2], how)


def normalised_adjacency(edges: torch.Tensor, nodes: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """D^(-1/2) (A + I) D^(-1/2) as a dense matrix."""
    matrix = torch.eye(nodes, dtype=torch.float64)
    entries = torch.ones(edges.shape[1], dtype=torch.float64) if weights is None else weights
    for (source, target), entry in zip(edges.T.tolist(), entries.tolist(), strict=True):
        matrix[target, source] += entry
    scale = matrix.sum(1).rsqrt()
    return scale[:, None] * matrix * scale
