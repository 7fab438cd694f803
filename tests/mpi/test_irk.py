"""Gauss and Radau methods on ranks with a preconditioner: the dense solve of the whole, and the same bits again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pnode_dist import GridPartition, Mesh, NeuralODE, Trajectory
from pnode_dist.nn import Conv2d
from tests.oracles.collocation import COLLOCATION
from tests.oracles.fields import convolved
from tests.oracles.implicit import odeint_implicit
from tests.oracles.right_hand_sides import distance, identical, random
from tests.tiers import at_night

pytestmark = pytest.mark.mpi

SHAPE, TIMES = (5, 4), [0.0, 0.1, 0.2]
TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-13, "snes_stol": 1e-14, "ksp_rtol": 1e-6, "ksp_atol": 1e-50}


class Diffusion(torch.nn.Module):
    """du/dt = 60 laplacian(u) - u^3 + cos(t), with a stencil that is learnt."""

    def __init__(self, grid: GridPartition) -> None:
        super().__init__()
        self.boundary = grid.boundary
        self.stencil = Conv2d(grid, 1, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            cross = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
            self.stencil.weight.copy_(60 * cross.reshape(1, 1, 3, 3))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.add(self.stencil(u), torch.cos(t) - u**3)

    def whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return convolved(u[None], self.boundary, self.stencil.weight, None)[0] + torch.cos(t) - u**3


@pytest.fixture(scope="module")
def grid(mesh: Mesh) -> GridPartition:
    return GridPartition(mesh, SHAPE, channels=1, boundary="periodic")


@pytest.mark.parametrize("method", at_night(["gauss4", "radau5"], ["radau5"]))
def test_a_preconditioned_field_is_the_dense_solve_of_the_whole(method: str, grid: GridPartition, mesh: Mesh) -> None:
    diffusion, whole = Diffusion(grid), random(*SHAPE, 1).requires_grad_()
    options = {**TIGHT, "pc_type": "bjacobi", "sub_pc_type": "lu"}
    node = NeuralODE(
        diffusion, method=method, step_size=0.1, partition=grid, preconditioner="assembled", options=options
    )
    local = grid.scatter(whole).requires_grad_()
    weight = diffusion.stencil.weight
    found = torch.autograd.grad(torch.sin(node(local, TIMES)).sum(), [local, weight])
    serial = odeint_implicit(diffusion.whole, whole, TIMES, COLLOCATION[method], 0.1)
    wanted = torch.autograd.grad(torch.sin(serial).sum(), [whole, weight])
    (y0, y1), (x0, x1) = grid.owned
    share = found[0] - wanted[0][y0:y1, x0:x1]
    assert float(share.abs().max()) <= 1e-10 * float(wanted[0].abs().max())
    assert distance(mesh.sum(found[1]), wanted[1]) <= 1e-10

    plain = NeuralODE(diffusion, method=method, step_size=0.1, partition=grid, options=TIGHT)
    plain(local, TIMES)
    assert node.last_solve.linear_iterations < plain.last_solve.linear_iterations


def test_a_preconditioned_step_has_the_same_bits_when_it_is_recomputed(grid: GridPartition) -> None:
    diffusion, u0 = Diffusion(grid), grid.scatter(random(*SHAPE, 1))

    def gradient(trajectory: Trajectory) -> tuple[torch.Tensor, ...]:
        settings: dict[str, Any] = {"method": "radau3", "step_size": 0.05, "preconditioner": "assembled"}
        node = NeuralODE(diffusion, partition=grid, trajectory=trajectory, **settings)
        start = u0.clone().requires_grad_()
        return torch.autograd.grad(torch.sin(node(start, TIMES)).sum(), [start, diffusion.stencil.weight])

    wanted = gradient(Trajectory(keep="graph"))
    assert identical(gradient(Trajectory(keep="stages")), wanted)
    assert identical(gradient(Trajectory(ram_slots=1)), wanted)
