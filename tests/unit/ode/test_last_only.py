"""`last_only`: the state at the last time alone, without what the others cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pnode_dist import NeuralODE, Trajectory, odeint
from tests.oracles.right_hand_sides import Network, gradients, identical, random

TIMES = [0.0, 0.4, 1.0]
U0 = random(2, 3)
SETTINGS: dict[str, dict[str, Any]] = {
    "rk4": {"method": "rk4", "step_size": 0.1},
    "two checkpoints": {"method": "midpoint", "step_size": 0.1, "trajectory": Trajectory(ram_slots=2)},
    "error control": {"rtol": 1e-5},
    "implicit": {"method": "cn", "step_size": 0.25},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_is_the_last_state_and_has_its_gradient_to_the_bit(settings: dict[str, Any]) -> None:
    func = Network()
    parameters = list(func.parameters())
    wanted = gradients(lambda u: odeint(func, u, TIMES, **settings)[-1], U0, parameters)
    found = gradients(lambda u: odeint(func, u, TIMES, last_only=True, **settings), U0, parameters)
    assert identical(found, wanted)


def test_of_a_tuple_it_is_a_tuple_and_of_one_time_the_initial_state() -> None:
    func = Network()
    pair = (U0, random(2, 3, seed=3))

    def coupled(t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return func(t, u[1]), func(t, u[0])

    every = odeint(coupled, pair, TIMES, step_size=0.1)
    last = odeint(coupled, pair, TIMES, step_size=0.1, last_only=True)
    assert all(torch.equal(one, other[-1]) for one, other in zip(last, every, strict=True))
    only = odeint(func, U0, [0.3], last_only=True)
    assert torch.equal(only, U0)
    assert only.data_ptr() != U0.data_ptr()


@pytest.mark.parametrize("keep", ["graph", "stages", "solution"])
def test_neither_initial_state_nor_result_is_shared_with_the_trajectory(keep: str) -> None:
    node = NeuralODE(Network(), step_size=0.25, trajectory=Trajectory(ram="1MiB", keep=keep), last_only=True)
    parameters = list(node.parameters())
    wanted = gradients(lambda u: 2.0 * node(u, TIMES), U0, parameters)
    # The result is the caller's, to be written into like any other.
    found = gradients(lambda u: node(u, TIMES).mul_(2.0), U0, parameters)
    assert identical(found, wanted)
    start = U0.clone().requires_grad_()
    node(start, TIMES).sum().backward()
    assert torch.equal(start, U0)


def test_a_tangent_of_it_is_that_of_the_last_state() -> None:
    direction = random(2, 3, seed=5)
    func = Network()
    value, tangent = NeuralODE(func, step_size=0.1).jvp(U0, TIMES, direction)
    last = NeuralODE(func, step_size=0.1, last_only=True)
    found = last.jvp(U0, TIMES, direction)
    assert torch.equal(found[0], value[-1])
    assert torch.equal(found[1], tangent[-1])


@pytest.mark.parametrize("training", [False, True])
def test_an_idle_solver_keeps_no_state(training: bool) -> None:
    node = NeuralODE(Network(), step_size=0.1, last_only=True)
    with torch.set_grad_enabled(training):
        result = node(U0, TIMES)
    (solver,) = node._solvers._solvers.values()
    assert solver.stepper.current.parts == ()
    if training:
        result.sum().backward()
        assert solver.stepper.current.parts == ()
