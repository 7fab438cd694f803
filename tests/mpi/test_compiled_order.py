"""The order of exchanges in compiled code is the same on all ranks, in whatever order the compiler puts the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import DensePartition, GraphPartition, GridPartition, Mesh
from pnode_dist.exchange import compiled, gather_vector, global_sum, halo, reduce_vector, with_ghosts
from pnode_dist.nn import Conv2d
from pnode_dist.system.torch_internals import TRACES_OBJECTS
from tests.oracles.graphs import random_edges
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.shuffled_graphs import Shuffled

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.slow,
    pytest.mark.skipif(not TRACES_OBJECTS, reason="this torch cannot compile exchanges"),
]

INDUCTOR = pytest.param("inductor", marks=pytest.mark.nightly)


@pytest.fixture
def sequence(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the exchanges that compiled code has made on this rank."""
    made: list[int] = []
    registered = compiled._registered

    def recorded(number: int) -> Any:
        made.append(number)
        return registered(number)

    monkeypatch.setattr(compiled, "_registered", recorded)
    torch.compiler.reset()
    return made


def by_age(sequence: list[int]) -> tuple[int, ...]:
    """The sequence with each map's place among the maps used, because a rank may have registered others before."""
    ages = sorted(set(sequence))
    return tuple(map(ages.index, sequence))


class Flow(nn.Module):
    """du/dt with two convolutions that do not depend on each other, and a sum over all ranks."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.partition = partition
        self.wide = Conv2d(partition, 2, 6, kernel_size=5, dtype=torch.float64)
        self.narrow = Conv2d(partition, 2, 6, kernel_size=(1, 3), dtype=torch.float64)
        self.last = Conv2d(partition, 6, 2, dtype=torch.float64)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        mean = global_sum(u.sin().sum(), self.partition.comm) / 100
        return self.last(torch.tanh(self.wide(u.sin()) * self.narrow(u * u))) + mean * u


def rk4(f: Callable[[torch.Tensor], torch.Tensor], u: torch.Tensor, h: float = 0.1) -> torch.Tensor:
    """One step of the classical Runge-Kutta method."""
    k1 = f(u)
    k2 = f(u + h / 2 * k1)
    k3 = f(u + h / 2 * k2)
    k4 = f(u + h * k3)
    return u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def uneven(mesh: Mesh) -> GridPartition:
    """Strips of 5, 8, 11 and 14 points."""
    rows = [5 + 3 * rank for rank in range(mesh.size)]
    return GridPartition(mesh, (sum(rows), 9), 2, ("periodic", "replicate"), 2, ownership=(rows, (9,)))


def value_and_gradients(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, parameters: list[torch.Tensor]
) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def backend_of(name: str, mesh: Mesh, seed: int = 0) -> Any:
    return Shuffled(100 * seed + mesh.rank) if name == "shuffled" else name


@pytest.mark.parametrize("backend", ["shuffled", INDUCTOR])
def test_a_whole_rk4_step_is_one_graph_with_one_order_on_all_ranks(
    backend: str, mesh: Mesh, sequence: list[int]
) -> None:
    flow = Flow(uneven(mesh))
    parameters: list[torch.Tensor] = list(flow.parameters())
    u = random(*flow.partition.local_shape, seed=mesh.rank)

    def step(u: torch.Tensor) -> torch.Tensor:
        return rk4(flow, u)

    wanted = value_and_gradients(step, u, parameters)
    assert not sequence
    used = backend_of(backend, mesh)
    compiled_step = torch.compile(step, fullgraph=True, dynamic=False, backend=used)
    for _ in range(2):
        sequence.clear()
        found = value_and_gradients(compiled_step, u, parameters)
        assert max(map(distance, found, wanted)) <= 1e-12
        # Four exchanges in each evaluation, in the order of the program, and in the reverse order backward.
        evaluation = sequence[:4]
        assert len(set(evaluation)) == 4
        assert sequence == 4 * evaluation + 4 * evaluation[::-1]
        assert len(set(mesh.state_comm.allgather(by_age(sequence)))) == 1
    if backend == "shuffled":
        # Other operations had other orders, so that the order of the exchanges was not theirs by chance.
        orders = mesh.state_comm.allgather(used.orders)
        assert len(used.orders) == 2
        assert len({str(order) for order in orders}) == mesh.size


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["shuffled", INDUCTOR])
def test_exchanges_of_all_kinds_keep_their_order(backend: str, mesh: Mesh, sequence: list[int]) -> None:
    graph = GraphPartition(mesh, random_edges(17, 60), 17, 2)
    vector = DensePartition(mesh, 7)
    grid = uneven(mesh)
    weight = random(7, 7).requires_grad_()

    def function(x: torch.Tensor) -> torch.Tensor:
        whole = gather_vector(x.cos(), vector)
        part = reduce_vector(whole @ weight, vector)
        nodes = with_ghosts(whole.sum() * x.new_ones(graph.local_shape), graph)
        around = halo(whole.mean() * x.new_ones(grid.local_shape), grid)
        unused = global_sum(x.sum(), vector.comm)
        del unused
        return part * global_sum(nodes.square().sum() + around.sin().sum(), vector.comm)

    x = random(3, *vector.local_shape, seed=mesh.rank)
    wanted = value_and_gradients(function, x, [weight])
    code = torch.compile(function, fullgraph=True, dynamic=False, backend=backend_of(backend, mesh, 1))
    found = value_and_gradients(code, x, [weight])
    assert max(map(distance, found, wanted)) <= 1e-12
    # A rank without ghosts and without nodes that others need has no exchange on the graph.
    shared = [number for number in sequence if compiled._maps[number].owner() is not graph]
    # The unused sum is there too, and its transpose of zeros.
    assert len(shared) == 10
    assert shared[5:] == shared[4::-1]
    assert len(set(mesh.state_comm.allgather(by_age(shared)))) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["shuffled", INDUCTOR])
def test_ranks_that_own_nothing_take_part_in_compiled_exchanges(backend: str, mesh: Mesh, sequence: list[int]) -> None:
    vector = DensePartition(mesh, max(1, mesh.size - 1))
    weight = random(vector.size, vector.size).requires_grad_()

    def function(x: torch.Tensor) -> torch.Tensor:
        # The last exchange returns nothing on the last rank, and the sum over nothing is known without it.
        part = reduce_vector(gather_vector(x.sin(), vector) @ weight, vector)
        return part.square().sum()

    x = random(2, *vector.local_shape, seed=mesh.rank)
    wanted = value_and_gradients(function, x, [weight])
    code = torch.compile(function, fullgraph=True, dynamic=False, backend=backend_of(backend, mesh, 2))
    found = value_and_gradients(code, x, [weight])
    assert max(map(distance, found, wanted)) <= 1e-12
    with torch.no_grad():
        code(x)
    assert len(sequence) == 6
    assert len(set(mesh.state_comm.allgather(by_age(sequence)))) == 1


@pytest.mark.nightly
def test_a_second_result_that_needs_no_gradient_keeps_the_order(mesh: Mesh, sequence: list[int]) -> None:
    grid = uneven(mesh)
    fixed = random(*grid.local_shape, seed=mesh.rank)

    def function(x: torch.Tensor) -> torch.Tensor:
        first = halo(x.sin(), grid)
        between = halo(fixed, grid)
        return (first * between).square().sum() + halo(x, grid).sum()

    x = random(*grid.local_shape, seed=mesh.rank)
    wanted = value_and_gradients(function, x, [])
    code = torch.compile(function, fullgraph=True, dynamic=False, backend=backend_of("shuffled", mesh, 3))
    assert max(map(distance, value_and_gradients(code, x, []), wanted)) <= 1e-12
    # Three exchanges, and the transposes of the first and the third.
    assert len(sequence) == 5
    assert MPI.COMM_WORLD.allreduce(len(sequence), MPI.MAX) == 5
