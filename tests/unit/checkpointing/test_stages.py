"""Steps whose stages are kept instead of graphs: the same gradient, f once more, and one graph at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import NeuralODE, Trajectory
from pnode_dist.ode.methods import METHODS
from tests.oracles.right_hand_sides import Network, distance, gradients, identical, random

TIMES, STEPS = [0.0, 0.4, 1.0], 10
METHOD_NAMES = ["euler", "rk4", "bosh3", "dopri5", "verner8"]
# Counted by hand from the tables: a last stage of weight zero is not evaluated.
EVALUATIONS = {"euler": 1, "rk4": 4, "bosh3": 3, "dopri5": 6, "verner8": 12}
KEEPS = ("graph", "solution", "stages")


class Pair(nn.Module):
    """Two parts of different shapes that drive each other."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(0.5 * random(3, 3))
        self.rate = nn.Parameter(random(2, seed=5))

    def forward(self, t: torch.Tensor, u: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = u
        return torch.tanh(first @ self.matrix) * second.sum(), torch.cos(t) * self.rate * second - first.mean()


def node_of(func: nn.Module, method: str, trajectory: Trajectory) -> NeuralODE:
    return NeuralODE(func, method=method, step_size=0.1, trajectory=trajectory)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_kept_stages_give_the_gradient_of_kept_graphs_up_to_rounding(method: str, dtype: torch.dtype) -> None:
    network, u0 = Network(dtype=dtype), random(2, 3, dtype=dtype)
    found = {}
    for keep in KEEPS:
        node = node_of(network, method, Trajectory("1MiB", keep=keep))
        found[keep] = gradients(lambda u: node(u, TIMES), u0, list(network.parameters()))  # noqa: B023
        assert node.last_solve.recomputed_steps == (STEPS - 1 if keep == "solution" else 0)
    assert found["stages"][1].dtype == dtype
    # The same numbers are added in another order.
    assert distance(found["stages"], found["graph"]) <= 20 * torch.finfo(dtype).eps
    assert identical(found["solution"], found["graph"])


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_kept_stages_of_a_tuple_give_the_gradient_of_kept_graphs_up_to_rounding(method: str) -> None:
    pair, found = Pair(), {}
    for keep in KEEPS:
        start = (random(2, 3).requires_grad_(), random(2, seed=3).requires_grad_())
        first, second = node_of(pair, method, Trajectory("1MiB", keep=keep))(start, TIMES)
        loss = torch.sin(first).sum() + second.square().sum()
        found[keep] = torch.autograd.grad(loss, [*start, *pair.parameters()])
    assert distance(found["stages"], found["graph"]) <= 1e-14
    assert identical(found["solution"], found["graph"])


@pytest.mark.parametrize("slots", [1, 3])
def test_steps_run_again_for_their_stages_give_the_bits_of_kept_stages(slots: int) -> None:
    network, u0 = Network(), random(2, 3)
    parameters = list(network.parameters())
    node = node_of(network, "dopri5", Trajectory(keep="stages", ram="1MiB"))
    ample = gradients(lambda u: node(u, TIMES), u0, parameters)
    node.trajectory = Trajectory(ram_slots=slots, keep="stages", schedule="revolve", ram=0)
    assert identical(gradients(lambda u: node(u, TIMES), u0, parameters), ample)
    assert node.last_solve.recomputed_steps >= STEPS - 1


@pytest.mark.parametrize("times", [TIMES, TIMES[::-1]], ids=["forward", "backward in time"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_with_all_stages_kept_f_is_evaluated_twice_a_stage_and_no_step_is_run_again(
    method: str, times: list[float]
) -> None:
    node = node_of(Network(), method, Trajectory(keep="stages", ram="1MiB"))
    for _ in range(2):
        solution = node(random(2, 3).requires_grad_(), times)
        assert node.last_solve.function_evaluations == STEPS * EVALUATIONS[method]
        solution.sum().backward()
        solve = node.last_solve
        assert solve.recomputed_steps == 0
        assert solve.graph_steps == STEPS
        assert solve.function_evaluations == 2 * STEPS * EVALUATIONS[method]


def test_the_methods_counted_by_hand_are_those_of_the_table() -> None:
    assert {name: METHODS[name].evaluations_per_step for name in EVALUATIONS} == EVALUATIONS


def test_kept_stages_are_charged_as_one_state_a_stage() -> None:
    # Float64 states of 2 x 3; 4 stages a step.
    node = node_of(Network(), "rk4", Trajectory(keep="stages", ram="1MiB"))
    node(random(2, 3).requires_grad_(), TIMES).sum().backward()
    assert node.last_solve.graph_bytes == STEPS * 4 * 2 * 3 * 8


def test_some_stages_are_kept_where_not_all_fit_and_no_more_than_fit() -> None:
    network, u0 = Network(), random(2, 3)
    parameters = list(network.parameters())
    node = node_of(network, "rk4", Trajectory(keep="stages", ram="1MiB"))
    ample = gradients(lambda u: node(u, TIMES), u0, parameters)
    step, checkpoint = 4 * 48, 48
    node.trajectory = Trajectory(keep="stages", ram=4 * step)
    assert identical(gradients(lambda u: node(u, TIMES), u0, parameters), ample)
    solve = node.last_solve
    assert 1 < solve.graph_steps < STEPS
    assert solve.graph_steps * step + solve.checkpoint_bytes_peak <= 4 * step
    assert solve.checkpoint_bytes_peak % checkpoint == 0
    assert 0 < solve.recomputed_steps < STEPS


class Counted(torch.autograd.Function):
    """The identity, which knows how many of its graphs are alive."""

    alive = 0
    most = 0

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)
        weakref.finalize(ctx, Counted.dropped)
        return u.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient

    @staticmethod
    def dropped() -> None:
        Counted.alive -= 1


class Watched(Network):
    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return super().forward(t, Counted.apply(u) if torch.is_grad_enabled() else u)


@pytest.fixture
def counted() -> Iterator[type[Counted]]:
    """No graph alive yet, and none found by the garbage collector alone."""
    Counted.alive = Counted.most = 0
    gc.collect()
    gc.disable()
    try:
        yield Counted
    finally:
        gc.enable()


@pytest.mark.parametrize("rtol", [None, 1e-4], ids=["steps of fixed size", "error control"])
@pytest.mark.parametrize("trajectory", [Trajectory("1MiB", keep="stages"), Trajectory(ram=96, keep="stages")])
def test_with_stages_one_stage_s_graph_is_alive_at_a_time(
    trajectory: Trajectory, rtol: float | None, counted: type[Counted]
) -> None:
    node = NeuralODE(Watched(), method="dopri5", step_size=0.1, rtol=rtol, trajectory=trajectory)
    loss = node(random(2, 3).requires_grad_(), TIMES).sum()
    assert counted.most == 0
    loss.backward()
    assert counted.most == 1
    assert counted.alive == 0


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_without_them_the_graphs_of_one_step_s_stages_are_alive_together(method: str, counted: type[Counted]) -> None:
    node = node_of(Watched(), method, Trajectory("1MiB", keep="solution"))
    node(random(2, 3).requires_grad_(), TIMES).sum().backward()
    assert counted.most == EVALUATIONS[method]
    assert counted.alive == 0


def test_with_graphs_those_of_all_steps_are_alive_together(counted: type[Counted]) -> None:
    node = node_of(Watched(), "rk4", Trajectory("1MiB", keep="graph"))
    loss = node(random(2, 3).requires_grad_(), TIMES).sum()
    assert counted.alive == STEPS * EVALUATIONS["rk4"]
    loss.backward()
    assert counted.alive == 0


@pytest.mark.parametrize("rtol", [None, 1e-4], ids=["steps of fixed size", "error control"])
@pytest.mark.parametrize("method", ["heun", "dopri5"])
@pytest.mark.parametrize("reversed_", [True, False], ids=["after its adjoint", "dropped without one"])
def test_no_graph_outlives_its_solve(reversed_: bool, method: str, rtol: float | None, counted: type[Counted]) -> None:
    trajectory = Trajectory("1MiB", keep="graph")
    node = NeuralODE(Watched(), method=method, step_size=0.1, rtol=rtol, trajectory=trajectory)
    loss = node(random(2, 3).requires_grad_(), TIMES).sum()
    assert counted.alive > STEPS // 2
    if reversed_:
        loss.backward()
    else:
        del loss
    assert counted.alive == 0
