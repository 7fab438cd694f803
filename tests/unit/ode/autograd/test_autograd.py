"""A solve as a node of torch's graph: several solves, several backward passes, solves inside solves."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from pnode_dist import NeuralODE, Trajectory, odeint
from tests.oracles.right_hand_sides import Network, distance, gradients, identical, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.0, 0.4, 1.0]
BUDGETS = [Trajectory(), Trajectory(ram=9000, solves=3), Trajectory(ram_slots=2), Trajectory(ram_slots=1, disk_slots=1)]


def plain(network: Network, u0: torch.Tensor, table: str = "4", step_size: float = 0.1) -> tuple[torch.Tensor, ...]:
    return gradients(
        lambda u: odeint_plain(network, u, TIMES, TABLEAUX[table], step_size), u0, list(network.parameters())
    )


def backpropagated(
    solution: torch.Tensor, start: torch.Tensor, network: Network, **options: Any
) -> tuple[torch.Tensor, ...]:
    targets = [start, *network.parameters()]
    return (solution.detach(), *torch.autograd.grad(torch.sin(solution).sum(), targets, **options))


@pytest.mark.parametrize("trajectory", BUDGETS)
@pytest.mark.parametrize("first", [0, 1])
def test_two_solves_before_the_first_backward_pass_keep_apart(first: int, trajectory: Trajectory) -> None:
    network = Network()
    node = NeuralODE(network, step_size=0.1, trajectory=trajectory)
    starts = [random(2, 3, seed=k).requires_grad_() for k in (1, 2)]
    solutions = [node(start, TIMES) for start in starts]
    for k in (first, 1 - first):
        found = backpropagated(solutions[k], starts[k], network)
        assert distance(found, plain(network, starts[k].detach())) <= 1e-12


@pytest.mark.parametrize("trajectory", BUDGETS)
def test_solves_of_one_module_may_be_chained(trajectory: Trajectory) -> None:
    network, u0 = Network(), random(2, 3)
    node, parameters = NeuralODE(network, step_size=0.1, trajectory=trajectory), list(network.parameters())
    found = gradients(lambda u: node(node(torch.sin(node(u, TIMES)[-1]), TIMES)[-1], TIMES[::-1]), u0, parameters)

    def by_hand(u: torch.Tensor) -> torch.Tensor:
        one = torch.sin(odeint_plain(network, u, TIMES, TABLEAUX["4"], 0.1)[-1])
        two = odeint_plain(network, one, TIMES, TABLEAUX["4"], 0.1)[-1]
        three: torch.Tensor = odeint_plain(network, two, TIMES[::-1], TABLEAUX["4"], 0.1)
        return three

    assert distance(found, gradients(by_hand, u0, parameters)) <= 1e-12


@pytest.mark.parametrize("trajectory", BUDGETS)
def test_a_second_backward_pass_gives_the_same_bits(trajectory: Trajectory) -> None:
    network, start = Network(), random(2, 3).requires_grad_()
    solution = odeint(network, start, TIMES, step_size=0.1, trajectory=trajectory)
    first = backpropagated(solution, start, network, retain_graph=True)
    second = backpropagated(solution, start, network, retain_graph=True)
    assert identical(first, second)
    assert distance(second, plain(network, start.detach())) <= 1e-12


def test_a_second_backward_pass_differentiates_another_loss_of_the_same_solve() -> None:
    network, start = Network(), random(2, 3).requires_grad_()
    node = NeuralODE(network, step_size=0.1)
    solution = node(start, TIMES)
    torch.autograd.grad(solution.sum(), [start], retain_graph=True)
    other = node(random(2, 3, seed=9), TIMES)
    found = backpropagated(solution, start, network)
    assert distance(found, plain(network, start.detach())) <= 1e-12
    other.sum().backward()


def test_a_second_backward_pass_through_a_freed_graph_is_refused() -> None:
    start = random(2, 3).requires_grad_()
    loss = odeint(Network(), start, TIMES).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_gradients_accumulate_over_backward_passes() -> None:
    network, u0 = Network(), random(2, 3)
    node = NeuralODE(network, step_size=0.1)
    for _ in range(2):
        torch.sin(node(u0, TIMES)).sum().backward()
    assert distance([p.grad for p in network.parameters()], [2 * g for g in plain(network, u0)[2:]]) <= 1e-12


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_solve_without_gradients_stores_nothing(requires_grad: bool) -> None:
    node = NeuralODE(Network(), step_size=0.1, trajectory=Trajectory(ram_slots=2, disk_slots=3))
    with torch.no_grad():
        solution = node(random(2, 3).requires_grad_(requires_grad), TIMES)
    assert not solution.requires_grad
    solve = node.last_solve
    assert (solve.checkpoint_bytes_peak, solve.bytes_written, solve.bytes_read) == (0, 0, 0)
    assert solve.forward_steps == 10


def test_a_solve_without_gradients_needs_no_checkpoint() -> None:
    with torch.no_grad():
        solution = odeint(Network(), random(2, 3), TIMES, step_size=0.1, trajectory=Trajectory(ram=0))
    assert solution.shape == (3, 2, 3)


def test_inference_mode_solves() -> None:
    network, u0 = Network(), random(2, 3)
    wanted = odeint(network, u0, TIMES).detach()
    with torch.inference_mode():
        found = odeint(network, u0, TIMES)
    assert torch.equal(found, wanted)


def test_values_are_the_same_with_and_without_gradients() -> None:
    network, u0 = Network(), random(2, 3)
    for method in ("euler", "3bs", "4", "5dp", "7vr", "8vr"):
        with torch.no_grad():
            bare = odeint(network, u0, TIMES, method=method, step_size=0.1)
        assert torch.equal(odeint(network, u0, TIMES, method=method, step_size=0.1), bare)


def test_a_graph_dropped_without_a_backward_pass_gives_its_checkpoints_back() -> None:
    node = NeuralODE(Network(), step_size=0.01, trajectory=Trajectory(ram_slots=50))
    u0 = random(2, 3)
    for _ in range(4):
        node(u0, TIMES)
        gc.collect()
    (solver,) = node._solvers._solvers.values()
    pools = [pool for pool in solver.pools.values() if not pool.on_disk]
    assert [len(pool._slots) for pool in pools] == [50]  # type: ignore[attr-defined]


@pytest.mark.parametrize("trajectory", BUDGETS)
def test_a_solve_inside_func_gives_the_gradients_of_plain_torch(trajectory: Trajectory) -> None:
    network, u0 = Network(), random(2, 3)
    # One outer step and the inner solves of its four stages await their backward passes at the same time.
    trajectory = replace(trajectory, solves=8)
    inner = NeuralODE(network, method="midpoint", step_size=0.5, trajectory=trajectory)
    parameters = list(network.parameters())

    def outer_func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        solution: torch.Tensor = inner(u, [0.0, 1.0])
        return solution[-1] * torch.cos(t)

    def outer_plain(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        solution: torch.Tensor = odeint_plain(network, u, [0.0, 1.0], TABLEAUX["2b"], 0.5)
        return solution[-1] * torch.cos(t)

    found = gradients(
        lambda u: odeint(outer_func, u, TIMES, step_size=0.2, trajectory=trajectory, params=parameters), u0, parameters
    )
    wanted = gradients(lambda u: odeint_plain(outer_plain, u, TIMES, TABLEAUX["4"], 0.2), u0, parameters)
    assert all(distance(f, w) <= 1e-12 for f, w in zip(found, wanted, strict=True))


def test_a_module_within_the_func_of_another_has_the_gradients_of_plain_torch() -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()
            self.inner = NeuralODE(self.network, method="heun")

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            solution: torch.Tensor = self.inner(u, [0.0, 0.5])
            return torch.sin(solution[-1])

    outer, u0 = Outer(), random(2, 3)
    node, network = NeuralODE(outer, step_size=0.3), outer.network
    parameters = list(node.parameters())
    found = gradients(lambda u: node(u, TIMES), u0, parameters)

    def by_hand(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.sin(odeint_plain(network, u, [0.0, 0.5], TABLEAUX["2a"])[-1])

    wanted = gradients(lambda u: odeint_plain(by_hand, u, TIMES, TABLEAUX["4"], 0.3), u0, parameters)
    assert all(distance(f, w) <= 1e-12 for f, w in zip(found, wanted, strict=True))


def test_a_solve_that_calls_itself_gives_the_gradients_of_plain_torch_or_is_refused() -> None:
    # One module, and so one TS, at two levels.
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if float(t) >= 100:
            return torch.tanh(rate * u)
        solution: torch.Tensor = node(u, [100.0, 100.5])
        return -solution[-1]

    def by_hand(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -odeint_plain(lambda s, v: torch.tanh(rate * v), u, [100.0, 100.5], TABLEAUX["4"], 0.25)[-1]

    node, u0 = NeuralODE(func, step_size=0.25, params=(rate,)), random(2, 3)
    wanted = gradients(lambda u: odeint_plain(by_hand, u, TIMES, TABLEAUX["4"], 0.25), u0, [rate])
    try:
        found = gradients(lambda u: node(u, TIMES), u0, [rate])
    except RuntimeError as error:
        assert "solve" in str(error)  # noqa: PT017
    else:
        assert distance(found, wanted) <= 1e-12


def test_a_hook_on_a_parameter_changes_the_whole_gradient_once() -> None:
    network, u0 = Network(), random(2, 3)
    wanted = plain(network, u0)[2]
    seen: list[torch.Tensor] = []

    def double(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(gradient.detach().clone())
        return 2 * gradient

    network.inner.register_hook(double)
    torch.sin(odeint(network, u0, TIMES, step_size=0.1)).sum().backward()
    assert network.inner.grad is not None
    assert distance(network.inner.grad, 2 * wanted) <= 1e-12
    assert distance(seen[-1], wanted) <= 1e-12
