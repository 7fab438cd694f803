"""Observations that communicate are those of the whole field, gradient included, at any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import GridPartition, Mesh, Trajectory, odeint
from pnode_dist.errors import DisagreementError
from pnode_dist.exchange import global_sum
from pnode_dist.nn import Conv2d
from tests.mpi.grids import block
from tests.oracles.fields import convolved
from tests.oracles.implicit import CRANK_NICOLSON, odeint_implicit
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

TIMES, STEP_SIZE, SHAPE = [0.0, 0.3, 0.7], 0.1, (6, 7)
BOUNDARY = ("replicate", "periodic")
EXACT = {"snes_rtol": 1e-13, "ksp_rtol": 1e-13}
SETTINGS: dict[str, dict[str, Any]] = {
    "graphs": {"method": "rk4"},
    "one checkpoint": {"method": "rk4", "trajectory": Trajectory(keep="solution", ram_slots=1)},
    "stages": {"method": "rk4", "trajectory": Trajectory(keep="stages", ram_slots=2)},
    "implicit": {"method": "cn", "options": EXACT, "trajectory": Trajectory(keep="solution", ram_slots=2)},
}


def _place(at: int, owned: tuple[int, int]) -> slice:
    """The local index of a global one; nothing where it is not owned."""
    first, last = owned
    return slice(at - first, at - first + 1) if first <= at < last else slice(0, 0)


class Models(nn.Module):
    """A right-hand side, and an observation with a convolution of its own and a sum over all ranks."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.partition = partition
        self.flow = Conv2d(partition, 2, 2, dtype=torch.float64)
        self.sensor = Conv2d(partition, 2, 1, dtype=torch.float64)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        rate: torch.Tensor = torch.tanh(self.flow(u)) + t
        return rate

    def observe(self, t: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The sensor's field on this rank, the energy of the whole field, and one point where it is owned."""
        sensed = self.sensor(u)
        rows, columns = (_place(at, owned) for at, owned in zip((2, 0), self.partition.owned, strict=True))
        return sensed, global_sum(u.square().sum(), self.partition.comm), u[rows, columns]

    def whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        batch = convolved(u.reshape(-1, *u.shape[-3:]), BOUNDARY, self.flow.weight, self.flow.bias)
        return torch.tanh(batch).reshape(u.shape) + t

    def sensed(self, states: torch.Tensor) -> torch.Tensor:
        """The sensor's field of all states."""
        return convolved(states, BOUNDARY, self.sensor.weight, self.sensor.bias)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_they_have_the_loss_and_gradient_of_the_whole_field(settings: dict[str, Any], mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    models = Models(partition)
    parameters = list(models.parameters())
    whole = random(*SHAPE, 2).requires_grad_()
    if settings["method"] == "cn":
        serial = odeint_implicit(models.whole, whole, TIMES, CRANK_NICOLSON, STEP_SIZE)
    else:
        serial = odeint_plain(models.whole, whole, TIMES, TABLEAUX["4"], STEP_SIZE)
    energies = serial.square().sum((1, 2, 3))
    serial_loss = models.sensed(serial).sin().sum() + energies.cos().sum() + serial[:, 2, 0].exp().sum()
    wanted = torch.autograd.grad(serial_loss, [whole, *parameters])

    local = partition.scatter(whole.detach()).requires_grad_()
    found = odeint(models, local, TIMES, step_size=STEP_SIZE, partition=partition, observe=models.observe, **settings)
    sensed, energy, point = found
    assert distance(energy, energies) <= 1e-12
    assert distance(sensed, block(partition, models.sensed(serial))) <= 1e-12
    # The energy is the same number on all ranks, so only the first one counts it.
    share = sensed.sin().sum() + point.exp().sum() + (energy.cos().sum() if mesh.state_comm.rank == 0 else 0.0)
    gradient = torch.autograd.grad(share, [local, *parameters])
    assert distance(gradient[0], block(partition, wanted[0])) <= 1e-12
    assert distance([mesh.sum(part) for part in gradient[1:]], wanted[1:]) <= 1e-12


def test_a_running_cost_of_the_whole_field_is_the_same_at_any_number_of_ranks(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    models = Models(partition)

    def cost(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return global_sum(u.square().sum(), partition.comm)

    def plain(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        rate = models.whole(t, s[:-1].reshape(*SHAPE, 2))
        return torch.cat([rate.reshape(-1), s[:-1].square().sum()[None]])

    whole = random(*SHAPE, 2).requires_grad_()
    start = torch.cat([whole.reshape(-1), torch.zeros(1, dtype=torch.float64)])
    serial = odeint_plain(plain, start, TIMES, TABLEAUX["4"], STEP_SIZE)[-1, -1]
    wanted = torch.autograd.grad(serial, [whole, *models.flow.parameters()])
    local = partition.scatter(whole.detach()).requires_grad_()
    _, integral = odeint(models, local, TIMES, step_size=STEP_SIZE, partition=partition, integrate=cost, last_only=True)
    assert distance(integral, serial) <= 1e-12
    share = integral * (1.0 if mesh.state_comm.rank == 0 else 0.0)
    gradient = torch.autograd.grad(share, [local, *models.flow.parameters()])
    assert distance(gradient[0], block(partition, wanted[0])) <= 1e-12
    assert distance([mesh.sum(part) for part in gradient[1:]], wanted[1:]) <= 1e-12


def test_the_cost_of_an_implicit_method_is_the_same_at_any_number_of_ranks(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    models = Models(partition)
    whole = random(*SHAPE, 2).requires_grad_()
    steps = [number * STEP_SIZE for number in range(4)]
    energies = odeint_implicit(models.whole, whole, steps, CRANK_NICOLSON).square().sum((1, 2, 3))
    serial = torch.trapezoid(energies, torch.tensor(steps, dtype=torch.float64))
    wanted = torch.autograd.grad(serial, [whole, *models.flow.parameters()])
    local = partition.scatter(whole.detach()).requires_grad_()
    _, integral = odeint(
        models,
        local,
        [steps[0], steps[-1]],
        method="cn",
        step_size=STEP_SIZE,
        partition=partition,
        integrate=lambda t, u: global_sum(u.square().sum(), partition.comm),
        last_only=True,
        options=EXACT,
        trajectory=Trajectory(keep="solution", ram_slots=1),
    )
    assert distance(integral, serial) <= 1e-12
    share = integral * (1.0 if mesh.state_comm.rank == 0 else 0.0)
    gradient = torch.autograd.grad(share, [local, *models.flow.parameters()])
    assert distance(gradient[0], block(partition, wanted[0])) <= 1e-12
    assert distance([mesh.sum(part) for part in gradient[1:]], wanted[1:]) <= 1e-12


def test_outputs_are_streamed_on_every_rank_and_gathered_by_the_consumer(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    models = Models(partition)
    whole = random(*SHAPE, 2)
    fields: list[torch.Tensor] = []

    def write(t: float, u: torch.Tensor) -> None:
        field = partition.gather(u)
        if field is not None:
            fields.append(field)

    with torch.no_grad():
        local = partition.scatter(whole)
        odeint(models, local, TIMES, step_size=STEP_SIZE, partition=partition, on_output=write)
        if mesh.state_comm.rank == 0:
            wanted = odeint_plain(models.whole, whole, TIMES, TABLEAUX["4"], STEP_SIZE)
            assert distance(torch.stack(fields), wanted) <= 1e-12
        else:
            assert fields == []


def test_ranks_that_ask_for_other_outputs_are_told(mesh: Mesh) -> None:
    if mesh.state_comm.size == 1:
        pytest.skip("one rank has nothing to differ from")
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    models = Models(partition)
    observe = models.observe if mesh.state_comm.rank == 0 else None
    local = partition.scatter(random(*SHAPE, 2))
    with pytest.raises(DisagreementError, match=r"observe: rank 0: given; .*: none"):
        odeint(models, local, TIMES, step_size=STEP_SIZE, partition=partition, observe=observe)
    save = "steps" if mesh.state_comm.rank == 0 else "times"
    with pytest.raises(DisagreementError, match=r"outputs: rank 0: every 1 steps; .*: times"):
        odeint(models, local, TIMES, step_size=STEP_SIZE, partition=partition, save=save)
