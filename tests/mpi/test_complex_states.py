"""Complex states on several ranks, against plain torch that computes with all of the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import (
    BatchPartition,
    DensePartition,
    DisagreementError,
    GridPartition,
    Mesh,
    NeuralODE,
    Trajectory,
    odeint,
)
from pnode_dist.exchange import global_sum, halo
from tests.oracles.right_hand_sides import distance
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

TIMES = [0.0, 0.3, 0.8]


class MeanField(nn.Module):
    """du/dt = i w u - i g sum |u|^2 u on one vector of complex amplitudes, distributed over the ranks of `comm`."""

    def __init__(self, comm: Any, owned: tuple[int, int]) -> None:
        super().__init__()
        self.comm, self.owned = comm, owned
        self.frequency = nn.Parameter(torch.tensor([1.0, 0.3], dtype=torch.float64))
        self.gain = nn.Parameter(torch.tensor(0.1 + 0.2j, dtype=torch.complex128))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        total = global_sum(u.abs().square().sum(), self.comm)
        return self.rate(t, u, total)

    def whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.rate(t, u, u.abs().square().sum())

    def rate(self, t: torch.Tensor, u: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return (1j * self.frequency[1] * torch.cos(t) - self.frequency[0]) * u - 1j * self.gain * total * u


@pytest.mark.parametrize(
    "settings",
    [
        {"trajectory": Trajectory(ram="1MiB", keep="graph")},
        {"trajectory": Trajectory(ram_slots=1, keep="solution", schedule="revolve")},
    ],
    ids=["graphs", "one checkpoint"],
)
def test_explicit_steps_and_gradients_are_those_of_the_whole_state(settings: dict[str, Any], mesh: Mesh) -> None:
    partition = DensePartition(mesh, 7)
    whole = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.complex128)
    begin, end = partition.owned
    f = MeanField(partition.comm, partition.owned)
    start, alone = whole[begin:end].clone().requires_grad_(), whole.clone().requires_grad_()
    found = NeuralODE(f, step_size=0.1, partition=partition, **settings)(start, TIMES)
    wanted = odeint_plain(f.whole, alone, TIMES, TABLEAUX["4"], 0.1)
    assert distance(found.detach(), wanted.detach()[:, begin:end]) < 1e-12
    own = torch.autograd.grad((found.real.square() + found.imag).sum(), [start, *f.parameters()])
    expected = torch.autograd.grad((wanted.real.square() + wanted.imag).sum(), [alone, *f.parameters()])
    assert distance(own[0], expected[0][begin:end]) < 1e-12
    sums = [mesh.sum(torch.view_as_real(part) if part.is_complex() else part) for part in own[1:]]
    views = [torch.view_as_real(part) if part.is_complex() else part for part in expected[1:]]
    assert distance(sums, views) < 1e-12


def test_halos_exchange_complex_numbers(mesh: Mesh) -> None:
    grid = GridPartition(mesh, (4, 6), channels=1, boundary=("periodic", "periodic"))
    speed = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def schroedinger(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        wide = halo(u, grid, 1)
        around = wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]
        return 1j * speed * (around - 4 * u)

    def whole(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        around = sum(torch.roll(u, shift, axis) for shift in (1, -1) for axis in (0, 1))
        return 1j * speed * (around - 4 * u)

    every = torch.randn(4, 6, 1, generator=torch.Generator().manual_seed(1), dtype=torch.complex128)
    (y0, y1), (x0, x1) = grid.owned
    start, alone = every[y0:y1, x0:x1].clone().requires_grad_(), every.clone().requires_grad_()
    found = odeint(schroedinger, start, TIMES, step_size=0.1, partition=grid)
    wanted = odeint_plain(whole, alone, TIMES, TABLEAUX["4"], 0.1)
    assert distance(found.detach(), wanted.detach()[:, y0:y1, x0:x1]) < 1e-12
    own = torch.autograd.grad((found.real.sin() + found.imag).sum(), [start, speed])
    expected = torch.autograd.grad((wanted.real.sin() + wanted.imag).sum(), [alone, speed])
    assert distance(own[0], expected[0][y0:y1, x0:x1]) < 1e-12
    assert distance(mesh.sum(own[1]), expected[1]) < 1e-12


def test_systems_of_complex_samples_are_solved_on_their_ranks(mesh: Mesh) -> None:
    samples = 2 * mesh.size + 1
    partition = BatchPartition(mesh, samples, (2,))
    matrix = torch.tensor([[1j, 0.5], [-0.5, -1.0 + 1j]], dtype=torch.complex128, requires_grad=True)
    whole = torch.randn(samples, 2, generator=torch.Generator().manual_seed(1), dtype=torch.complex128)
    begin, end = partition.owned
    found = odeint(
        lambda t, u: u @ matrix.T, whole[begin:end], [0.0, 0.1], method="cn", newton="batch", partition=partition
    )[-1]
    unit = torch.eye(2, dtype=torch.complex128)
    wanted = torch.linalg.solve(unit - 0.05 * matrix, (unit + 0.05 * matrix) @ whole.T).T
    assert distance(found.detach(), wanted.detach()[begin:end]) < 1e-12
    (own,) = torch.autograd.grad((found.abs().square()).sum(), matrix)
    (expected,) = torch.autograd.grad((wanted.abs().square()).sum(), matrix)
    assert distance(mesh.sum(torch.view_as_real(own)), torch.view_as_real(expected)) < 1e-11


def test_a_real_state_on_one_rank_is_an_error_on_all(mesh: Mesh) -> None:
    partition = DensePartition(mesh, 7)
    begin, end = partition.owned
    u0 = torch.ones(end - begin, dtype=torch.float64 if mesh.rank == 0 else torch.complex128)
    if mesh.size == 1:
        assert odeint(lambda t, u: -u, u0, TIMES, step_size=0.1, partition=partition).shape == (3, 7)
        return
    with pytest.raises(DisagreementError, match="the ranks differ in"):
        odeint(lambda t, u: -u, u0, TIMES, step_size=0.1, partition=partition)
