"""torch.utils.checkpoint round a solve: the same gradient, and no trajectory between the passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pnode_dist import NeuralODE, RecomputationError, Trajectory, odeint
from tests.oracles.right_hand_sides import Network, distance, gradients, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.0, 0.5, 1.0]
METHODS: dict[str, dict[str, Any]] = {
    "rk4": {"method": "rk4", "step_size": 0.125},
    "cn": {"method": "cn", "step_size": 0.125},
    "dopri5": {"method": "dopri5", "rtol": 1e-5, "atol": 1e-7},
}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
EVERY_LEVEL = pytest.mark.parametrize("keep", ["solution", "stages", "graph", "auto"])


def node_of(method: str, keep: str, network: Network | None = None) -> NeuralODE:
    budget = Trajectory(ram="1MiB", keep=keep)
    return NeuralODE(network or Network(), trajectory=budget, **METHODS[method])


def held_bytes(node: NeuralODE) -> int:
    """The memory that unreversed solves have booked."""
    assert node.trajectory is not None
    return node.trajectory.ledger.ram


@EVERY_METHOD
@EVERY_LEVEL
def test_gradients_are_those_without_checkpointing(method: str, keep: str) -> None:
    node, u0 = node_of(method, keep), random(4, 3)
    parameters = list(node.parameters())
    wanted = gradients(lambda u: node(u, TIMES), u0, parameters)
    found = gradients(lambda u: checkpoint(node, u, TIMES, use_reentrant=False), u0, parameters)
    assert distance(found, wanted) == 0.0


@EVERY_LEVEL
def test_gradients_are_those_of_plain_torch(keep: str) -> None:
    node, u0 = node_of("rk4", keep), random(4, 3)
    parameters = list(node.parameters())

    def plain(u: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = odeint_plain(node.func, u, TIMES, TABLEAUX["4"], 0.125)
        return found

    found = gradients(lambda u: checkpoint(node, u, TIMES, use_reentrant=False), u0, parameters)
    assert distance(found, gradients(plain, u0, parameters)) < 1e-12


@EVERY_METHOD
@EVERY_LEVEL
def test_the_trajectory_s_memory_is_free_between_the_passes(method: str, keep: str) -> None:
    node, u0 = node_of(method, keep), random(4, 3).requires_grad_()
    bare = node(u0, TIMES)
    assert held_bytes(node) > 0
    del bare
    assert held_bytes(node) == 0
    found = checkpoint(node, u0, TIMES, use_reentrant=False)
    assert held_bytes(node) == 0
    found.sum().backward()
    assert held_bytes(node) == 0
    assert u0.grad is not None


@EVERY_LEVEL
def test_chained_checkpointed_solves_hold_one_trajectory_at_a_time(keep: str) -> None:
    held: list[int] = []

    class Watched(Network):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            held.append(held_bytes(node))
            return super().forward(t, u)

    node, u0 = node_of("rk4", keep, Watched()), random(4, 3)
    parameters = list(node.parameters())

    def peak(checkpoints: bool) -> tuple[int, tuple[torch.Tensor, ...]]:
        def chained(u: torch.Tensor) -> torch.Tensor:
            for _ in range(4):
                u = (checkpoint(node, u, TIMES, use_reentrant=False) if checkpoints else node(u, TIMES))[-1]
            return u

        held.clear()
        found = gradients(chained, u0, parameters)
        return max(held), found

    apart, wanted = peak(False)
    together, found = peak(True)
    assert distance(found, wanted) == 0.0
    assert 0 < together == apart // 4


@EVERY_METHOD
def test_a_solve_is_part_of_a_larger_checkpointed_piece(method: str) -> None:
    network, u0 = Network(), random(4, 3)
    weight = random(3, 3, seed=5).requires_grad_()
    parameters = [*network.parameters(), weight]

    def piece(u: torch.Tensor) -> torch.Tensor:
        first = odeint(network, torch.tanh(u @ weight), TIMES, **METHODS[method])[-1]
        return odeint(network, torch.sin(first @ weight), TIMES, **METHODS[method])[-1]

    wanted = gradients(piece, u0, parameters)
    assert distance(gradients(lambda u: checkpoint(piece, u, use_reentrant=False), u0, parameters), wanted) == 0.0


def test_a_second_backward_pass_over_a_retained_graph_gives_the_same() -> None:
    node, u0 = node_of("rk4", "graph"), random(4, 3).requires_grad_()
    loss = checkpoint(node, u0, TIMES, use_reentrant=False).square().sum()
    first, second = (torch.autograd.grad(loss, [u0], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_reentrant_checkpointing_gives_the_same_gradient() -> None:
    node, u0 = node_of("rk4", "solution"), random(4, 3)
    parameters = list(node.parameters())
    wanted = gradients(lambda u: node(u, TIMES), u0, parameters)[1:]
    start = u0.clone().requires_grad_()
    torch.sin(checkpoint(node, start, TIMES, use_reentrant=True)).sum().backward()
    found = [start.grad, *(parameter.grad for parameter in parameters)]
    assert distance(found, wanted) == 0.0


def test_a_recomputation_with_another_result_is_an_error() -> None:
    class Changing(Network):
        factor = 1.0

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return self.factor * super().forward(t, u)

    network, u0 = Changing(), random(4, 3).requires_grad_()
    found = checkpoint(node_of("rk4", "graph", network), u0, TIMES, use_reentrant=False)
    network.factor = 2.0
    with pytest.raises(RecomputationError):
        found.sum().backward()
