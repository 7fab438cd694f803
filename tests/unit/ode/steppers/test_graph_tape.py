"""Steps recorded as one graph: one pass of autograd, with the same bits for any division into graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import NeuralODE, Trajectory
from pnode_dist.ode.methods import METHODS
from tests.oracles.right_hand_sides import Network, distance, identical, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

EXPLICIT = [name for name, method in METHODS.items() if method.family == "rk"]
TRAJECTORIES = {
    "graph": Trajectory(ram="1MiB", keep="graph"),
    "solution": Trajectory(ram="1MiB", keep="solution"),
    "stages": Trajectory(ram="1MiB", keep="stages"),
    "two checkpoints": Trajectory(ram_slots=2),
    "graphs of some": Trajectory(ram="8KiB"),
}
STEP_SIZE = 1 / 11
OUTPUT_TIMES = [pytest.param([0.0, 1.0], marks=pytest.mark.nightly), [0.0, 0.35, 1.0]]


class Repeating(nn.Module):
    """Uses its state and its parameters several times."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.network(t, u) + torch.cos(t) * self.network(t, u * u) - 0.1 * u


class WithCost(nn.Module):
    """Two states, of which neither rate depends on the second."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = Repeating()

    def forward(self, t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        rate = self.rate(t, u[0])
        return rate, rate.square().sum(dim=1, keepdim=True)


class Twins(nn.Module):
    """Three states of one rate, which is one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = Repeating()

    def forward(self, t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        rate = self.rate(t, u[0] + torch.sin(u[1]) * u[2])
        return rate, rate, rate


def gradient(node: NeuralODE, state: Any, times: list[float]) -> tuple[torch.Tensor, ...]:
    start = random(4, 3).requires_grad_()
    solution = node((start, random(4, 1)) if state == "tuple" else start, times)
    parts = solution if isinstance(solution, tuple) else (solution,)
    loss = sum(torch.sin(part).sum() for part in parts)
    return torch.autograd.grad(loss, [start, *node.parameters()])


def check_equal(found: dict[str, list[tuple[torch.Tensor, ...]]]) -> None:
    """Stage by stage the same numbers are added in another order, so that the gradient differs by rounding."""
    wanted = found["graph"][0]
    for name, gradients in found.items():
        for one in gradients:
            assert distance(one, wanted) <= 1e-14 if name == "stages" else identical(one, wanted), name


@pytest.mark.parametrize("state", ["tensor", "tuple"])
@pytest.mark.parametrize("times", OUTPUT_TIMES, ids=["end", "between"])
@pytest.mark.parametrize("method", EXPLICIT)
def test_the_gradient_has_the_same_bits_whatever_is_kept(method: str, times: list[float], state: str) -> None:
    func = WithCost() if state == "tuple" else Repeating()
    found = {}
    for name, trajectory in TRAJECTORIES.items():
        node = NeuralODE(func, method=method, step_size=STEP_SIZE, trajectory=trajectory)
        # In the first solve f is watched, in the second it is not.
        found[name] = [gradient(node, state, times), gradient(node, state, times)]
    check_equal(found)


@pytest.mark.parametrize("method", ["midpoint", "rk4", "dopri5"])
def test_it_has_where_f_returns_one_tensor_for_several_parts(method: str) -> None:
    func, found = Twins(), dict[str, list[tuple[torch.Tensor, ...]]]()
    for name, trajectory in TRAJECTORIES.items():
        node = NeuralODE(func, method=method, step_size=STEP_SIZE, trajectory=trajectory, last_only=True)
        for _ in range(2):
            start = random(4, 3).requires_grad_()
            parts = node((start, random(4, 3, seed=2), random(4, 3, seed=3)), [0.0, 1.0])
            loss = sum((torch.sin(part) * (number + 1)).sum() for number, part in enumerate(parts))
            found.setdefault(name, []).append(torch.autograd.grad(loss, [start, *node.parameters()]))
    check_equal(found)


def test_it_is_that_of_back_propagation_through_plain_steps() -> None:
    func, start = Repeating(), random(4, 3).requires_grad_()
    node = NeuralODE(func, method="dopri5", step_size=STEP_SIZE, trajectory=TRAJECTORIES["graph"])
    times = [0.0, 0.35, 1.0]
    solution = odeint_plain(func, start, times, TABLEAUX["5dp"], STEP_SIZE)
    wanted = torch.autograd.grad(torch.sin(solution).sum(), [start, *func.parameters()])
    assert distance(gradient(node, "tensor", times), wanted) <= 1e-13


def passes_over(node: NeuralODE, times: list[float]) -> int:
    """The runs of autograd that reversed f."""
    passes: set[int] = set()

    def seen(module: nn.Module, given: Any, value: torch.Tensor) -> None:
        if value.requires_grad:
            value.register_hook(lambda cotangent: passes.add(torch._C._current_graph_task_id()))

    with node.func.register_forward_hook(seen):
        gradient(node, "tensor", times)
    return len(passes)


def test_eight_steps_are_one_pass_of_autograd_and_end_where_the_state_is_asked_for() -> None:
    node = NeuralODE(Repeating(), method="rk4", step_size=1 / 20, trajectory=TRAJECTORIES["graph"])
    # The first step of the first solve is measured, and recorded by itself.
    gradient(node, "tensor", [0.0, 1.0])
    assert passes_over(node, [0.0, 1.0]) == 3
    node.step_size = 1 / 8
    assert passes_over(node, [0.0, 1.0]) == 1
    assert passes_over(node, [0.0, 0.25, 1.0]) == 2


class Tuned(nn.Module):
    """Takes a derivative by its parameter, as a function of state and parameter apart."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            energy = (torch.sin(u) * self.scale**2).sum()
            (slope,) = torch.autograd.grad(energy, self.scale, create_graph=recorded)
        return -u * slope


@pytest.mark.parametrize("make", [lambda func: func, lambda func: lambda t, u: func(t, u)], ids=["module", "function"])
def test_derivatives_that_f_takes_by_its_parameters_are_not_through_its_state(make: Callable[..., Any]) -> None:
    tuned, start = Tuned(), random(3).requires_grad_()

    def by_formula(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -u * 2 * tuned.scale * torch.sin(u).sum()

    node = NeuralODE(make(tuned), step_size=0.1, trajectory=TRAJECTORIES["graph"], params=[tuned.scale])
    plain = odeint_plain(by_formula, start, [0.0, 1.0], TABLEAUX["4"], 0.1)
    wanted = torch.autograd.grad(plain.sum(), [start, tuned.scale])
    solution = node(start, [0.0, 1.0])
    assert distance(solution, plain) <= 1e-14
    assert distance(torch.autograd.grad(solution.sum(), [start, tuned.scale]), wanted) <= 1e-13
    assert node.last_solve.function_evaluations == 40


def test_a_recorded_f_that_writes_into_its_state_is_refused() -> None:
    def writes(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            u.mul_(2)
        return -u

    node = NeuralODE(writes, step_size=0.1, trajectory=TRAJECTORIES["graph"])
    with pytest.raises(RuntimeError, match="func changed its state u by an in-place operation"):
        node(random(3).requires_grad_(), [0.0, 1.0])


def test_values_that_f_returns_in_the_same_memory_each_time_are_taken_one_by_one() -> None:
    buffer = torch.empty(3, dtype=torch.float64)

    def forcing(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return buffer.copy_(t.expand(3))

    node = NeuralODE(forcing, step_size=0.25, trajectory=TRAJECTORIES["graph"], last_only=True)
    start = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    end = node(start, [0.0, 1.0])
    assert distance(end, torch.full((3,), 0.5, dtype=torch.float64)) <= 1e-15
    (found,) = torch.autograd.grad(end.sum(), start)
    assert torch.equal(found, torch.ones_like(found))
