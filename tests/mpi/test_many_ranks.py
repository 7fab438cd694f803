"""Gradients and messages on more ranks than cores: 8, 16, 27 and 64 (`launch/nightly.sh`), with uneven parts.

The reference is the same solve on one rank, which other tests compare with plain torch. What is sent is compared with
what the ownership alone requires.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import DensePartition, GraphPartition, GridPartition, NeuralODE, SpectralPartition, Trajectory
from pnode_dist.bench import halo as bench
from pnode_dist.exchange import irfft2, irfftn, rfft2, rfftn, with_ghosts
from pnode_dist.nn import Conv2d, Conv3d, GraphConv, Linear
from tests.mpi.grids import block
from tests.oracles.graphs import random_edges
from tests.oracles.right_hand_sides import distance, random

pytestmark = [pytest.mark.mpi, pytest.mark.nightly]

COMM = MPI.COMM_WORLD
D = torch.float64
TIMES = [0.0, 0.1, 0.3]
NODES = 331
BUDGETS = {"graphs": Trajectory(), "one checkpoint": Trajectory(keep="solution", ram_slots=1)}
Made = tuple[Any, nn.Module, torch.Tensor]


class Tanh(nn.Module):
    """A right-hand side of two layers."""

    def __init__(self, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        rate: torch.Tensor = self.outer(torch.tanh(self.inner(u) + t))
        return rate


class Advection(nn.Module):
    """A nonlinear spectral equation with a learnt viscosity."""

    def __init__(self, spectrum: SpectralPartition) -> None:
        super().__init__()
        self.spectrum = spectrum
        self.numbers, self.mask = spectrum.wavenumbers(), spectrum.dealias()
        self.viscosity = nn.Parameter(torch.tensor(0.01, dtype=D))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        ky, kx = self.numbers
        modes = rfft2(u * u, self.spectrum) * self.mask
        smooth = self.viscosity * (ky**2 + kx**2) * rfft2(u, self.spectrum)
        return irfft2(-0.5j * kx * modes - smooth, self.spectrum) * (1 + t)


def plane(comm: MPI.Comm) -> Made:
    grid = GridPartition(comm, (41, 53), channels=2, boundary=("replicate", "periodic"))
    func = Tanh(Conv2d(grid, 2, 3, dtype=D), Conv2d(grid, 3, 2, dtype=D))
    return grid, func, random(41, 53, 2)


def cube(comm: MPI.Comm) -> Made:
    grid = GridPartition(comm, (9, 10, 13), channels=1, boundary=("periodic", "reflect", "zero"))
    return grid, Tanh(Conv3d(grid, 1, 2, dtype=D), Conv3d(grid, 2, 1, dtype=D)), random(9, 10, 13, 1)


def graph(comm: MPI.Comm) -> Made:
    partition = GraphPartition(comm, random_edges(NODES, 4 * NODES), NODES, 2)
    return partition, Tanh(GraphConv(partition, 2, 3, dtype=D), GraphConv(partition, 3, 2, dtype=D)), random(NODES, 2)


def vector(comm: MPI.Comm) -> Made:
    # Fewer hidden entries than 64 ranks: some own none.
    outer, inner = DensePartition(comm, 203), DensePartition(comm, 50)
    return outer, Tanh(Linear(outer, inner, dtype=D), Linear(inner, outer, dtype=D)), random(203)


def spectral(comm: MPI.Comm) -> Made:
    grid = GridPartition(comm, (67, 131), channels=1, boundary="periodic")
    return grid, Advection(SpectralPartition(grid)), 0.1 * random(67, 131, 1)


PROBLEMS: dict[str, Callable[[MPI.Comm], Made]] = {
    "plane": plane,
    "cube": cube,
    "graph": graph,
    "vector": vector,
    "spectral": spectral,
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_gradients_are_those_of_one_rank(make: Callable[[MPI.Comm], Made], budget: Trajectory) -> None:
    def solved(comm: MPI.Comm) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(0)
        partition, func, whole = make(comm)
        u0 = own(partition, whole).clone().requires_grad_()
        node = NeuralODE(func, step_size=0.1, partition=partition, trajectory=budget)
        states = node(u0, TIMES)
        weight = own(partition, random(*whole.shape, seed=7))
        gradient = torch.autograd.grad((weight * states.sin()).sum(), [u0, *func.parameters()])
        return partition, states.detach(), list(gradient)

    partition, states, found = solved(COMM)
    _, every, wanted = solved(MPI.COMM_SELF)
    assert close(states, own(partition, every), every) <= 1e-12
    assert close(found[0], own(partition, wanted[0]), wanted[0]) <= 1e-12
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        assert distance(total(mine), theirs) <= 1e-12


def total(share: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' shares of a gradient."""
    found = share.clone(memory_format=torch.contiguous_format)
    COMM.Allreduce(MPI.IN_PLACE, found.numpy(), MPI.SUM)
    return found


def own(partition: Any, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole field, with any axes before it."""
    if isinstance(partition, GraphPartition):
        return whole[..., partition.owned, :]
    if isinstance(partition, DensePartition):
        return whole[..., slice(*partition.owned)]
    return block(partition, whole)


def close(found: torch.Tensor, wanted: torch.Tensor, whole: torch.Tensor) -> float:
    """The largest difference of a part, which may be empty, relative to the whole field."""
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / whole.abs().max()) if found.numel() else 0.0


CASES = [
    bench.Case((41, 53), 2, D, ("replicate", "periodic"), 1),
    bench.Case((33, 31), 3, torch.float32, ("reflect", "periodic"), 2),
    bench.Case((9, 10, 13), 1, D, ("periodic", "reflect", "zero"), 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_halo_sends_one_message_a_face_and_no_byte_too_many(case: bench.Case) -> None:
    traffic = bench.measure(COMM, case, repeats=1)
    assert traffic.excess == 0
    assert traffic.messages == traffic.faces
    assert traffic.sent == traffic.returned == traffic.least


def test_a_graph_sends_each_rank_its_ghosts_and_no_more() -> None:
    counting = bench.CountingComm(COMM)
    edges = random_edges(NODES, 4 * NODES)
    partition = GraphPartition(counting, edges, NODES, 2)
    owner = torch.empty(NODES, dtype=torch.long)
    for rank, nodes in enumerate(COMM.allgather(partition.owned)):
        owner[torch.as_tensor(nodes)] = rank
    pairs = {(source, int(owner[target])) for source, target in edges.T.tolist() if owner[source] != owner[target]}
    mine = [(source, to) for source, to in pairs if owner[source] == COMM.rank]
    counting.reset()
    with_ghosts(random(len(partition.owned), 2), partition)
    assert counting.messages == len({to for _, to in mine})
    assert counting.bytes == len(mine) * 2 * 8


def test_a_transform_sends_each_rank_one_message_with_what_it_owns_afterwards() -> None:
    counting = bench.CountingComm(COMM)
    grid = GridPartition(counting, (67, 131), channels=2, processes=(COMM.size, 1))
    spectrum = SpectralPartition(grid)
    x = block(grid, random(67, 131, 2)).clone().requires_grad_()
    counting.reset()
    modes = rfft2(x, spectrum)
    rows = grid.owned[0][1] - grid.owned[0][0]
    columns = spectrum.owned[1][1] - spectrum.owned[1][0]
    assert (counting.messages, counting.bytes) == (COMM.size - 1, rows * (66 - columns) * 2 * 16)
    counting.reset()
    torch.autograd.grad(modes.abs().sum(), x)
    assert (counting.messages, counting.bytes) == (COMM.size - 1, columns * (67 - rows) * 2 * 16)


def test_pencils_send_one_message_to_each_rank_of_a_row_and_of_a_column() -> None:
    counting, shape = bench.CountingComm(COMM), (16, 16, 32)
    rows, columns = processes = SpectralPartition(GridPartition(COMM, shape)).processes
    grid = GridPartition(counting, shape, processes=(rows, columns, 1))
    spectrum = SpectralPartition(grid, processes=processes)
    whole = random(*shape, 1)
    counting.reset()
    modes = rfftn(block(grid, whole), spectrum)
    assert counting.messages == rows - 1 + columns - 1
    wanted = torch.fft.rfftn(whole, dim=(-4, -3, -2))
    assert close(modes, block(spectrum.blocks, wanted), wanted) <= 1e-12
    assert close(irfftn(modes, spectrum), block(grid, whole), whole) <= 1e-12


@pytest.mark.parametrize("lines", [3, 100])
def test_lines_are_transformed_on_fewer_or_more_ranks(lines: int) -> None:
    spectrum = SpectralPartition(GridPartition(COMM, (131,)))
    whole = random(131, lines)
    x = block(spectrum.grid, whole).clone().requires_grad_()
    alone = whole.clone().requires_grad_()
    modes, wanted = rfftn(x, spectrum), torch.fft.rfft(alone, dim=-2)
    assert close(modes.detach(), block(spectrum.blocks, wanted.detach()), wanted.detach()) <= 1e-12
    (theirs,) = torch.autograd.grad(wanted.abs().pow(3).sum(), alone)
    (mine,) = torch.autograd.grad(modes.abs().pow(3).sum(), x)
    assert close(mine, block(spectrum.grid, theirs), theirs) <= 1e-12
