"""NeuralODE: settings take effect, the solver is kept, the module is an ordinary one."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch

from pnode_dist import NeuralODE, Trajectory, odeint
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import resolve
from tests.oracles.checkpointing import fewest_solve_steps
from tests.oracles.right_hand_sides import Network, distance, gradients, identical, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.0, 0.4, 1.0]
U0 = random(2, 3)


@pytest.fixture
def node() -> NeuralODE:
    return NeuralODE(Network(), step_size=0.1)


def results(node: NeuralODE) -> tuple[torch.Tensor, ...]:
    return gradients(lambda u: node(u, TIMES), U0, list(node.parameters()))


def test_it_is_odeint_to_the_bit(node: NeuralODE) -> None:
    wanted = gradients(lambda u: odeint(node.func, u, TIMES, step_size=0.1), U0, list(node.parameters()))
    assert identical(results(node), wanted)
    assert identical(results(node), wanted)


@pytest.mark.parametrize("method", ["euler", "8vr", "dopri5"])
def test_a_changed_method_takes_effect(node: NeuralODE, method: str) -> None:
    results(node)
    node.method = method
    table = TABLEAUX[resolve(method).petsc_name]
    wanted = gradients(lambda u: odeint_plain(node.func, u, TIMES, table, 0.1), U0, list(node.parameters()))
    assert distance(results(node), wanted) <= 1e-12


def test_a_changed_step_size_and_trajectory_take_effect(node: NeuralODE) -> None:
    results(node)
    node.step_size, node.trajectory = 0.05, Trajectory(ram_slots=3)
    wanted = gradients(lambda u: odeint_plain(node.func, u, TIMES, TABLEAUX["4"], 0.05), U0, list(node.parameters()))
    assert distance(results(node), wanted) <= 1e-12
    assert node.last_solve.forward_steps == 20
    assert node.last_solve.forward_steps + node.last_solve.recomputed_steps == fewest_solve_steps(20, 3)


def test_changed_parameters_take_effect(node: NeuralODE) -> None:
    results(node)
    with torch.no_grad():
        for parameter in node.parameters():
            parameter.mul_(0.5)
    wanted = gradients(lambda u: odeint_plain(node.func, u, TIMES, TABLEAUX["4"], 0.1), U0, list(node.parameters()))
    assert distance(results(node), wanted) <= 1e-12


def test_an_unknown_method_is_refused_when_it_is_given(node: NeuralODE) -> None:
    with pytest.raises(ConfigurationError, match=r"method = 'rk45'.*must be one of .*dopri5"):
        NeuralODE(Network(), method="rk45")
    node.method = "rk45"
    with pytest.raises(ConfigurationError, match="method = 'rk45'"):
        node(U0, TIMES)


def test_every_step_of_training_lowers_the_loss(node: NeuralODE) -> None:
    optimizer = torch.optim.SGD(node.parameters(), lr=0.02)
    target, losses = random(3, 2, 3, seed=4), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = ((node(U0, TIMES) - target) ** 2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_its_state_dict_is_func_s(node: NeuralODE) -> None:
    assert set(node.state_dict()) == {f"func.{name}" for name in Network().state_dict()}
    other = NeuralODE(Network(seed=5), step_size=0.1)
    other.load_state_dict(node.state_dict())
    assert identical(results(other), results(node))


def test_extra_arguments_are_handed_to_func() -> None:
    node = NeuralODE(lambda t, u, rate, shift: -rate * u + shift, method="8vr")
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    node(U0, [0.0, 1.0], rate, 0.0)[-1].sum().backward()
    assert rate.grad is not None
    torch.testing.assert_close(rate.grad, -(U0 * torch.exp(torch.tensor(-0.5))).sum(), rtol=1e-6, atol=0)


def test_it_can_be_moved_to_another_type_after_a_solve(node: NeuralODE) -> None:
    results(node)
    node.float()
    solution = node(U0.float(), TIMES)
    assert solution.dtype == torch.float32
    solution.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in node.parameters())


@pytest.mark.parametrize("solved", [False, True])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda node: pickle.loads(pickle.dumps(node))], ids=["deepcopy", "pickle"]
)
def test_a_copy_solves_like_the_original_and_on_its_own(node: NeuralODE, duplicate: Any, solved: bool) -> None:
    wanted = results(node)
    original = node if solved else NeuralODE(node.func, step_size=0.1)
    copied = duplicate(original)
    assert identical(results(copied), wanted)
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert identical(results(node), wanted)


def test_torch_saves_and_loads_it_whole(node: NeuralODE) -> None:
    wanted, file = results(node), io.BytesIO()
    torch.save(node, file)
    file.seek(0)
    assert identical(results(torch.load(file, weights_only=False)), wanted)


def test_a_solver_is_freed_with_its_module() -> None:
    network = Network()

    def solve() -> "weakref.ref[Any]":
        other = NeuralODE(network, step_size=0.1)
        results(other)
        (solver,) = other._solvers._solvers.values()
        return weakref.ref(solver.stepper)

    stepper = solve()
    gc.collect()
    assert stepper() is None


def test_counts_are_those_of_the_last_solve(node: NeuralODE) -> None:
    node(U0, TIMES)
    first = node.last_solve
    node(U0, [0.0, 0.2])[-1].sum().backward()
    assert (first.forward_steps, first.adjoint_steps) == (10, 0)
    assert (node.last_solve.forward_steps, node.last_solve.adjoint_steps) == (2, 2)
    assert node.last_solve.vjps == 8
    # Every stage is evaluated once where the budget holds all graphs.
    assert node.last_solve.function_evaluations == 8


def test_it_prints_its_settings(node: NeuralODE) -> None:
    assert "method=None, step_size=0.1" in repr(node)
    node.method, node.rtol = "bosh3", 1e-5
    assert "method='bosh3', step_size=0.1, rtol=1e-05, atol=None" in repr(node)
