"""A map between steps that communicates is that of the whole field, gradient included, at any number of ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import GridPartition, Mesh, NeuralODE, Trajectory, odeint
from pnode_dist.errors import DisagreementError
from pnode_dist.exchange import global_sum
from pnode_dist.nn import Conv2d
from pnode_dist.system.torch_internals import TRACES_OBJECTS
from tests.mpi.grids import block
from tests.oracles.between_steps import Step, in_equal_steps, mapped_solve
from tests.oracles.events import step as explicit_step
from tests.oracles.fields import convolved
from tests.oracles.implicit import CRANK_NICOLSON, odeint_implicit
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX

pytestmark = pytest.mark.mpi

TIMES, STEP_SIZE, SHAPE = [0.0, 0.3, 0.7], 0.1, (6, 7)
BOUNDARY = ("replicate", "periodic")
EXACT = {"snes_rtol": 1e-13, "ksp_rtol": 1e-13}
SETTINGS: dict[str, dict[str, Any]] = {
    "graphs": {"method": "rk4", "step_size": STEP_SIZE},
    "stages": {"method": "rk4", "step_size": STEP_SIZE, "trajectory": Trajectory(keep="stages", ram_slots=2)},
    "one checkpoint": {
        "method": "rk4",
        "step_size": STEP_SIZE,
        "trajectory": Trajectory(keep="solution", ram_slots=1),
    },
    "error control": {"method": "dopri5", "rtol": 1e-4, "trajectory": Trajectory(keep="solution", ram_slots=2)},
    "implicit": {
        "method": "cn",
        "step_size": STEP_SIZE,
        "options": EXACT,
        "trajectory": Trajectory(keep="solution", ram_slots=2),
    },
}


class Models(nn.Module):
    """A right-hand side, and a map with a convolution of its own that keeps the sum of squares of the whole field."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.partition = partition
        self.flow = Conv2d(partition, 2, 2, dtype=torch.float64)
        self.smoother = Conv2d(partition, 2, 2, dtype=torch.float64)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        rate: torch.Tensor = torch.tanh(self.flow(u)) + t
        return rate

    def between(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        smooth = u + 0.1 * torch.sin(t) * self.smoother(u)
        energies = torch.stack([u.square().sum(), smooth.square().sum()])
        before, after = global_sum(energies, self.partition.comm)
        return smooth * (before / after).sqrt()

    def whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        batch = convolved(u.reshape(-1, *u.shape[-3:]), BOUNDARY, self.flow.weight, self.flow.bias)
        return torch.tanh(batch).reshape(u.shape) + t

    def between_whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        smoothed = convolved(u[None], BOUNDARY, self.smoother.weight, self.smoother.bias)[0]
        smooth = u + 0.1 * torch.sin(t) * smoothed
        return smooth * (u.square().sum() / smooth.square().sum()).sqrt()


def _step(models: Models, method: str) -> Step:
    def step(t: torch.Tensor, u: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        if method == "cn":
            return odeint_implicit(models.whole, u, torch.stack([t, t + size]), CRANK_NICOLSON)[-1]
        return explicit_step(models.whole, TABLEAUX["4" if method == "rk4" else "5dp"], t, u, size)

    return step


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_has_the_loss_and_gradient_of_the_whole_field(settings: dict[str, Any], mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    models = Models(partition)
    parameters = list(models.parameters())
    whole = random(*SHAPE, 2).requires_grad_()
    local = partition.scatter(whole.detach()).requires_grad_()
    saved = odeint(
        models, local, TIMES, partition=partition, between_steps=models.between, save=("times", "steps"), **settings
    )
    if "rtol" in settings:
        intervals = list(pairwise(saved.t.detach()))
    else:
        ends = in_equal_steps(torch.tensor(TIMES, dtype=torch.float64), STEP_SIZE)
        intervals = [pair for times in ends for pair in pairwise(times)]
    serial = torch.stack(mapped_solve(_step(models, settings["method"]), models.between_whole, whole, intervals))
    assert distance(saved.u, block(partition, serial)) <= 1e-12
    wanted = torch.autograd.grad(serial.sin().sum(), [whole, *parameters])
    gradient = torch.autograd.grad(saved.u.sin().sum(), [local, *parameters])
    assert distance(gradient[0], block(partition, wanted[0])) <= 1e-12
    assert distance([mesh.sum(part) for part in gradient[1:]], wanted[1:]) <= 1e-12


@pytest.mark.nightly
def test_second_derivatives_are_those_of_the_whole_field(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    models = Models(partition)
    whole, along = random(*SHAPE, 2).requires_grad_(), random(*SHAPE, 2, seed=3)
    intervals = in_equal_steps(torch.tensor([0.0, 0.3], dtype=torch.float64), STEP_SIZE)
    end = mapped_solve(_step(models, "rk4"), models.between_whole, whole, intervals)[-1]
    (first,) = torch.autograd.grad(end.sin().sum(), whole, create_graph=True)
    (wanted,) = torch.autograd.grad((first * along).sum(), whole)
    local = partition.scatter(whole.detach()).requires_grad_()
    node = NeuralODE(models, step_size=STEP_SIZE, partition=partition, between_steps=models.between, last_only=True)
    (first,) = torch.autograd.grad(node(local, [0.0, 0.3]).sin().sum(), local, create_graph=True)
    (found,) = torch.autograd.grad((first * partition.scatter(along)).sum(), local)
    assert distance(found, block(partition, wanted)) <= 1e-11


def test_a_map_on_some_ranks_alone_is_an_error_on_all(mesh: Mesh) -> None:
    if mesh.state_comm.size == 1:
        pytest.skip("needs several ranks")
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    models = Models(partition)
    local = partition.scatter(random(*SHAPE, 2))
    between = models.between if mesh.state_comm.rank == 0 else None
    with pytest.raises(DisagreementError, match="between_steps"):
        odeint(models, local, TIMES, step_size=STEP_SIZE, partition=partition, between_steps=between)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(not TRACES_OBJECTS, reason="this torch cannot compile exchanges")
def test_compiled_steps_with_a_map_that_communicates_are_the_same(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    models = Models(partition)
    local = partition.scatter(random(*SHAPE, 2)).requires_grad_()

    def solved(**compiled: Any) -> list[torch.Tensor]:
        node = NeuralODE(models, step_size=STEP_SIZE, partition=partition, between_steps=models.between, **compiled)
        states = node(local, TIMES)
        return [states.detach(), *torch.autograd.grad(states.sin().sum(), [local, *models.parameters()])]

    assert distance(solved(compile="eager"), solved()) <= 1e-12
