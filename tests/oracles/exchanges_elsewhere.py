"""Run on several ranks: each exchange and its transpose on another device, against the same on the CPU.

Prints the names of those whose results are there, and bit for bit the CPU's on every rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from mpi4py import MPI

from pnode_dist import DensePartition, GraphPartition, GridPartition
from pnode_dist.exchange import gather_vector, global_sum, halo, redistribute, reduce_vector, with_ghosts
from tests.oracles.other_device import Hidden, other_device

WORLD = MPI.COMM_WORLD
Exchange = Callable[[torch.Tensor], torch.Tensor]


def both_ways(exchange: Exchange, x: torch.Tensor, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The image of `x`, and that of a cotangent under the transpose."""
    leaf = x.clone().requires_grad_()
    image = exchange(leaf)
    return image.detach(), torch.autograd.grad(image, leaf, cotangent.reshape(-1)[: image.numel()].view(image.shape))[0]


def agrees(exchange: Exchange, x: torch.Tensor) -> bool:
    cotangent = torch.randn(10_000, dtype=x.dtype)
    there = both_ways(exchange, x.to(other_device()), cotangent.to(other_device()))
    here = both_ways(exchange, x, cotangent)
    assert all(isinstance(value, Hidden) for value in there)
    return all(torch.equal(one.cpu(), other) for one, other in zip(there, here, strict=True))


def main() -> None:
    torch.manual_seed(WORLD.rank)
    other_device()
    dense = DensePartition(WORLD, 5)
    walls = GridPartition(WORLD, (9, 6), channels=2, stencil_width=2, boundary=("reflect", 1.5))
    ring = GridPartition(WORLD, (9, 6), channels=2, boundary="periodic")
    columns = GridPartition(WORLD, (9, 6), processes=(1, WORLD.size))
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]])
    graph = GraphPartition(WORLD, edges, nodes=7, features=3)
    cases: dict[str, tuple[Exchange, torch.Tensor]] = {
        "global_sum": (lambda x: global_sum(x, WORLD), torch.randn(2, 3)),
        "gather_vector": (lambda x: gather_vector(x, dense), torch.randn(2, *dense.local_shape)),
        "reduce_vector": (lambda x: reduce_vector(x, dense), torch.randn(2, 5)),
        "halo": (lambda x: halo(x, walls), torch.randn(*walls.local_shape)),
        "periodic": (lambda x: halo(x, ring), torch.randn(*ring.local_shape)),
        "redistribute": (lambda x: redistribute(x, ring, columns), torch.randn(*ring.local_shape)),
        "with_ghosts": (lambda x: with_ghosts(x, graph), torch.randn(*graph.local_shape)),
    }
    for name, (exchange, x) in cases.items():
        if WORLD.allreduce(agrees(exchange, x), MPI.LAND) and WORLD.rank == 0:
            print(name)


if __name__ == "__main__":
    main()
