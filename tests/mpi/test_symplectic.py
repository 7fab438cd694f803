"""Symplectic steps of fields on several ranks: solution and gradient are those of the whole field."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import (
    ConfigurationError,
    DisagreementError,
    GridPartition,
    Mesh,
    NeuralODE,
    Separable,
    Trajectory,
    odeint,
)
from pnode_dist.nn import Conv2d
from tests.oracles.fields import convolved
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.symplectic import STEPS, odeint_symplectic

pytestmark = pytest.mark.mpi

SHAPE, BOUNDARY, TIMES, STEP_SIZE = (7, 9), ("replicate", "periodic"), [0.0, 0.3, 0.8], 0.1


class Waves(nn.Module):
    """The momentum of a nonlinear wave: a convolution of the displacement, on a partitioned grid or on all of it."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = Conv2d(partition, 2, 2, dtype=torch.float64)
        self.speed = nn.Parameter(torch.tensor([1.0, 0.5], dtype=torch.float64))

    def forward(self, t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(q)) * torch.cos(t) - q

    def whole(self, t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        result = convolved(q[None], BOUNDARY, self.conv.weight, self.conv.bias)[0]
        return torch.tanh(result) * torch.cos(t) - q

    def velocity(self, t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return self.speed * p + 0.1 * torch.sin(t)


class Both(nn.Module):
    """The same system as one function."""

    def __init__(self, waves: Waves) -> None:
        super().__init__()
        self.waves = waves

    def forward(self, t: torch.Tensor, u: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.waves.velocity(t, u[1]), self.waves(t, u[0])


@pytest.fixture
def grid(mesh: Mesh) -> GridPartition:
    return GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)


def here(whole: torch.Tensor, grid: GridPartition) -> torch.Tensor:
    (y0, y1), (x0, x1) = grid.owned
    return whole[..., y0:y1, x0:x1, :]


@pytest.mark.parametrize("keep", ["graph", "stages", "solution"])
@pytest.mark.parametrize("separable", [False, True], ids=["one function", "two parts"])
@pytest.mark.parametrize("method", STEPS)
def test_a_field_has_the_solution_and_gradient_of_the_whole(
    method: str, separable: bool, keep: str, grid: GridPartition, mesh: Mesh
) -> None:
    waves = Waves(grid)
    parameters = list(waves.parameters())
    whole = random(*SHAPE, 2).requires_grad_(), random(*SHAPE, 2, seed=3).requires_grad_()
    local = tuple(grid.scatter(part.detach()).requires_grad_() for part in whole)
    wanted = torch.stack(odeint_symplectic(waves.velocity, waves.whole, whole, TIMES, STEPS[method], STEP_SIZE))
    func = Separable(position=waves.velocity, momentum=waves) if separable else Both(waves)
    node = NeuralODE(
        func, method=method, step_size=STEP_SIZE, partition=grid, trajectory=Trajectory(keep=keep), params=parameters
    )
    found = torch.stack(node(local, TIMES))
    assert distance(found, here(wanted.detach(), grid)) <= 1e-12
    expected = torch.autograd.grad(torch.sin(wanted).sum(), [*whole, *parameters])
    gradients = torch.autograd.grad(torch.sin(found).sum(), [*local, *parameters])
    for gradient, share in zip(gradients[:2], expected[:2], strict=True):
        assert distance(gradient, here(share, grid)) <= 1e-12
    assert distance([mesh.sum(gradient) for gradient in gradients[2:]], expected[2:]) <= 1e-12


def test_a_state_that_is_no_pair_on_some_rank_is_an_error_on_all(grid: GridPartition, comm: MPI.Comm) -> None:
    waves = Waves(grid)
    part = grid.scatter(random(*SHAPE, 2))
    u0 = part if comm.rank == 0 else (part, part)
    with pytest.raises((ConfigurationError, DisagreementError)) as caught:
        odeint(Both(waves), u0, TIMES, method="leapfrog", partition=grid)
    assert len(set(comm.allgather(str(caught.value)))) == 1
    assert "u0 must be a pair (q, p)" in str(caught.value)
