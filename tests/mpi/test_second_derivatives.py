"""Second derivatives and tangents of a state spread over the ranks: those of the whole, on any number of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jvp, vmap

from pnode_dist import ConfigurationError, GridPartition, Mesh, NeuralODE, SplitFunction, Trajectory
from pnode_dist.nn import Conv2d
from pnode_dist.ode.methods import resolve
from tests.mpi.grids import block
from tests.oracles.fields import convolved
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain
from tests.tiers import at_night

pytestmark = pytest.mark.mpi

TIMES, STEP_SIZE, SHAPE = [0.0, 0.2, 0.5], 0.1, (5, 7)
TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-14, "snes_stol": 1e-15, "ksp_rtol": 1e-13}
Solver = Callable[[torch.Tensor], torch.Tensor]


class Flow(nn.Module):
    """du/dt = conv(tanh(conv(u))) + t, on a partitioned grid or on a whole one."""

    def __init__(self, partition: GridPartition, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.boundary = partition.boundary
        self.first = Conv2d(partition, 2, 3, dtype=torch.float64)
        self.second = Conv2d(partition, 3, 2, dtype=torch.float64)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.tanh(self.first(u))) + t
        return result

    def whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        batch = u.reshape(-1, *u.shape[-3:])
        batch = torch.tanh(convolved(batch, self.boundary, self.first.weight, self.first.bias))
        batch = convolved(batch, self.boundary, self.second.weight, self.second.bias)
        return batch.reshape(u.shape) + t


class Whole(nn.Module):
    """The same on the whole grid, on every rank."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.flow.whole(t, u)


def products(
    solve: Solver, u0: torch.Tensor, parameters: list[torch.Tensor], along: torch.Tensor, directions: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The gradient of (gradient by the state)^3 + <gradient by the parameters, directions> + <state's, along>."""
    start = u0.detach().clone().requires_grad_()
    found = torch.autograd.grad(torch.sin(solve(start)).sum(), [start, *parameters], create_graph=True)
    value = (found[0] ** 3).sum() + (found[0] * along).sum()
    value = value + sum((part * direction).sum() for part, direction in zip(found[1:], directions, strict=True))
    return list(torch.autograd.grad(value, [start, *parameters]))


def compared(
    mesh: Mesh, partition: GridPartition, parameters: list[torch.Tensor], found: list[torch.Tensor], wanted: Any
) -> float:
    """How far this rank's part of the first result, and the sums over the ranks of the others, are from the whole's."""
    summed = [mesh.sum(part.detach()) for part in found[1:]]
    return distance([found[0], *summed], [block(partition, wanted[0]), *wanted[1:]])


def setting(mesh: Mesh) -> tuple[GridPartition, Flow, list[torch.Tensor], list[torch.Tensor]]:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=("replicate", "periodic"))
    flow = Flow(partition)
    parameters: list[torch.Tensor] = list(flow.parameters())
    return partition, flow, parameters, [random(*part.shape, seed=8) for part in parameters]


@pytest.mark.parametrize("keep", ["graph", "stages", "solution"])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "euler"])
def test_second_derivatives_are_those_of_the_whole_field(method: str, keep: str, mesh: Mesh) -> None:
    partition, flow, parameters, directions = setting(mesh)
    whole, along = random(*SHAPE, 2), random(*SHAPE, 2, seed=6)
    table = TABLEAUX[resolve(method).petsc_name]
    wanted = products(
        lambda u: odeint_plain(flow.whole, u, TIMES, table, STEP_SIZE), whole, parameters, along, directions
    )
    node = NeuralODE(
        flow,
        method=method,
        step_size=STEP_SIZE,
        partition=partition,
        trajectory=Trajectory(ram="4MiB", keep=keep),
    )
    found = products(lambda u: node(u, TIMES), block(partition, whole), parameters, block(partition, along), directions)
    assert compared(mesh, partition, parameters, found, wanted) <= 1e-12


@pytest.mark.parametrize("method", at_night(["cn", "beuler", "arkimex_3", None], but=["arkimex_3", None]))
def test_second_derivatives_do_not_depend_on_the_number_of_ranks(method: str | None, mesh: Mesh) -> None:
    partition = setting(mesh)[0]
    whole, along = random(*SHAPE, 2), random(*SHAPE, 2, seed=6)

    def of(everywhere: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        parts = [Flow(partition), Flow(partition, seed=2)]
        first, second = (Whole(part) if everywhere else part for part in parts)
        func: nn.Module = SplitFunction(implicit=first, explicit=second) if method == "arkimex_3" else first
        settings: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
        if method is not None:
            settings = {"method": method, "step_size": STEP_SIZE, "options": TIGHT}
        node = NeuralODE(func, partition=None if everywhere else partition, **settings)
        parameters: list[torch.Tensor] = list(func.parameters())
        directions = [random(*part.shape, seed=8) for part in parameters]
        start, direction = (whole, along) if everywhere else (block(partition, whole), block(partition, along))
        return products(lambda u: node(u, TIMES), start, parameters, direction, directions), parameters

    wanted, _ = of(everywhere=True)
    found, parameters = of(everywhere=False)
    assert compared(mesh, partition, parameters, found, wanted) <= 1e-8


def test_a_rank_without_a_cotangent_takes_part(mesh: Mesh) -> None:
    partition, flow, parameters, _ = setting(mesh)
    whole = random(*SHAPE, 2)
    first = partition.comm.rank == 0

    def by_state(slope: torch.Tensor) -> torch.Tensor:
        return (slope**3).sum()

    start = whole.clone().requires_grad_()
    states = odeint_plain(flow.whole, start, TIMES, TABLEAUX["4"], STEP_SIZE)
    (slope,) = torch.autograd.grad(torch.sin(states).sum(), start, create_graph=True)
    wanted = torch.autograd.grad(by_state(slope[:1, :1]), [start, *parameters])
    wanted = tuple(wanted)

    local = block(partition, whole).detach().clone().requires_grad_()
    node = NeuralODE(flow, step_size=STEP_SIZE, partition=partition)
    found = torch.autograd.grad(torch.sin(node(local, TIMES)).sum(), [local, *parameters], create_graph=True)
    # The first rank owns the corner; of the others' gradients only those by parameters are used, times zero.
    value = by_state(found[0][:1, :1]) if first else 0 * found[1].sum()
    second = list(torch.autograd.grad(value, [local, *parameters]))
    assert compared(mesh, partition, parameters, second, wanted) <= 1e-12


def test_tangents_and_gradients_by_torch_func_are_those_of_the_whole_field(mesh: Mesh) -> None:
    partition, flow, _, _ = setting(mesh)
    whole, along = random(*SHAPE, 2), random(*SHAPE, 2, seed=6)
    node = NeuralODE(flow, step_size=STEP_SIZE, partition=partition)
    own, direction = block(partition, whole), block(partition, along)

    def plain(u: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = odeint_plain(flow.whole, u, TIMES, TABLEAUX["4"], STEP_SIZE)
        return states

    def slope_of(solve: Solver) -> Solver:
        return grad(lambda u: torch.sin(solve(u)).sum())

    def node_at(u: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = node(u, TIMES)
        return states

    for transform in (lambda f: f, slope_of):
        _, wanted = jvp(transform(plain), (whole,), (along,))
        _, found = jvp(transform(node_at), (own,), (direction,))
        assert distance(found, block(partition, wanted)) <= 1e-12


def test_a_batch_of_solves_on_several_ranks_is_refused(mesh: Mesh) -> None:
    partition, flow, _, _ = setting(mesh)
    node = NeuralODE(flow, step_size=STEP_SIZE, partition=partition)
    own = block(partition, random(*SHAPE, 2))
    attempts: list[Callable[[], Any]] = [
        lambda: vmap(lambda u: node(u, TIMES))(torch.stack([own, own])),
        lambda: hessian(lambda u: node(u, TIMES).sum())(own),
        lambda: torch.autograd.functional.jacobian(lambda u: node(u, TIMES).sum().reshape(1), own, vectorize=True),
    ]
    for attempt in attempts:
        if partition.comm.size == 1:
            attempt()
            continue
        with pytest.raises(ConfigurationError, match=r"vmap: the state is spread over .* NeuralODE\.jvp"):
            attempt()
