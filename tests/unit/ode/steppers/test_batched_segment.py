"""Compiled segments of implicit steps agree with eager steps, and leave to these what they cannot do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from pnode_dist import ConvergenceError, NeuralODE, SplitFunction, Trajectory
from tests.oracles.right_hand_sides import gradients, random
from tests.oracles.stiff_right_hand_sides import Constrained, StiffNetwork
from tests.tiers import at_night

pytestmark = pytest.mark.slow
TIMES = [0.0, 0.2, 0.5]
# Newton's method to rounding.
TIGHT = {"snes_rtol": 1e-14, "snes_atol": 1e-15, "snes_stol": 1e-15}


def agree(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> bool:
    return all(
        bool((value - other).detach().abs().max() <= tolerance * other.detach().abs().max())
        for value, other in zip(found, wanted, strict=True)
    )


def gradient(function: Any, u0: torch.Tensor, parameters: list[Any], **keywords: Any) -> list[torch.Tensor]:
    node = NeuralODE(function, step_size=0.1, options=TIGHT, newton="batch", **keywords)
    return list(gradients(lambda u: node(u, TIMES), u0, parameters))


@pytest.mark.parametrize("backend", at_night(["aot_eager", "inductor"], ["aot_eager"]))
@pytest.mark.parametrize("method", at_night(["beuler", "cn", "dirk_es213sal", "radau3", "arkimex_3"], ["beuler"]))
def test_compiled_steps_have_the_gradients_of_eager_ones(method: str, backend: str) -> None:
    network, u0 = StiffNetwork(), random(4, 3)
    split = SplitFunction(implicit=network.stiff, explicit=network.other)
    parameters = list(network.parameters())
    found = gradient(split, u0, parameters, method=method, compile=backend)
    assert agree(found, gradient(split, u0, parameters, method=method), 1e-12)


@pytest.mark.parametrize("components", at_night([1, 2, 3, 4], [3]))
def test_systems_of_each_size_are_solved_in_compiled_code(components: int) -> None:
    matrix = random(components, components, seed=3).requires_grad_()
    rates = torch.linspace(1.0, 30.0, components, dtype=torch.float64)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ matrix) - rates * u

    u0 = random(5, components)
    found = gradient(func, u0, [matrix], method="beuler", compile="aot_eager")
    assert agree(found, gradient(func, u0, [matrix], method="beuler"), 1e-12)


@pytest.mark.nightly
def test_a_mass_matrix_and_algebraic_equations_are_compiled() -> None:
    constrained, u0 = Constrained(), random(2, 3)
    mass = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64).expand(2, 3)
    parameters = list(constrained.parameters())
    keywords: dict[str, Any] = {"method": "beuler", "mass": mass}
    found = gradient(constrained, u0, parameters, compile="aot_eager", **keywords)
    assert agree(found, gradient(constrained, u0, parameters, **keywords), 1e-12)


def test_states_in_parts_and_extra_arguments_are_compiled() -> None:
    def func(t: torch.Tensor, u: tuple[torch.Tensor, ...], rate: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return u[1][:, 0] - rate * u[0], u[0][:, None] - torch.sin(t) * u[1] ** 3

    rate = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    u0 = (random(4), random(4, 2))
    found = []
    for compile in (False, "aot_eager"):
        node = NeuralODE(func, method="cn", step_size=0.1, options=TIGHT, newton="batch", compile=compile)
        states = node(u0, TIMES, rate)
        found.append([*states, *torch.autograd.grad(states[1].square().sum(), rate)])
    assert agree(found[1], found[0], 1e-12)


def test_a_function_that_cannot_be_compiled_as_a_whole_is_solved_uncompiled() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return -3 * u

    u0 = random(4, 3)
    with pytest.warns(RuntimeWarning, match=r"^compile: steps are not compiled, because "):
        found = gradient(func, u0, [], method="beuler", compile="aot_eager")
    assert agree(found, gradient(func, u0, [], method="beuler"), 1e-12)


@pytest.mark.nightly
def test_what_compiled_code_cannot_solve_is_left_to_eager_code() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -50 * torch.atan(10 * u)

    u0 = torch.tensor([[3.0], [0.01], [-2.0]], dtype=torch.float64)
    node = NeuralODE(func, method="beuler", newton="batch", step_size=1.0, compile="aot_eager")
    ends = node(u0, [0.0, 1.0])[-1]
    assert (ends - u0 - func(torch.zeros(()), ends)).abs().max() <= 1e-7
    with pytest.raises(ConvergenceError, match=r"^step 0 at t = 0, 1 long: .*DIVERGED_"):
        NeuralODE(lambda t, u: 1 + u**2, method="beuler", newton="batch", step_size=1.0, compile="aot_eager")(
            torch.full((2, 1), 5.0, dtype=torch.float64), [0.0, 1.0]
        )


@pytest.mark.nightly
def test_samples_that_depend_on_one_another_are_found_by_compiled_code() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -3 * (u + torch.tanh(u.mean(0)))

    u0 = random(4, 3)
    node = NeuralODE(func, method="beuler", step_size=0.1, compile="aot_eager")
    node(u0, TIMES)
    assert node.last_solve.linear_iterations > 0


@pytest.mark.nightly
def test_many_states_of_different_sizes_are_all_compiled() -> None:
    network = StiffNetwork()
    node = NeuralODE(network, method="beuler", step_size=0.25, options=TIGHT, newton="batch", compile="aot_eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message="compile")
        for samples in range(2, 14):
            node(random(samples, 3), TIMES)
            # Nine updates in each call of a step.
            assert node.last_solve.function_evaluations % 9 == 0, samples


@pytest.mark.nightly
def test_too_many_versions_of_a_function_are_solved_uncompiled() -> None:
    def func(t: torch.Tensor, u: torch.Tensor, rate: float) -> torch.Tensor:
        return -rate * u

    node = NeuralODE(func, method="beuler", step_size=0.25, newton="batch", compile="aot_eager")
    u0 = torch.ones(3, 2, dtype=torch.float64)
    with torch.no_grad():
        for number in range(12):
            rate = 0.1 * number + 0.05
            ends = node(u0, [0.0, 0.5], rate)[-1]
            assert torch.allclose(ends, u0 / (1 + 0.25 * rate) ** 2, rtol=1e-12), rate


@pytest.mark.nightly
@pytest.mark.parametrize("keep", ["graph", "stages", "solution"])
def test_all_levels_have_the_gradients_in_states_parameters_and_times(keep: str) -> None:
    network, u0 = StiffNetwork(), random(4, 3)
    parameters = list(network.parameters())
    times = torch.tensor([0.0, 0.3, 0.8], dtype=torch.float64, requires_grad=True)
    found = []
    for compile in (False, "aot_eager"):
        node = NeuralODE(
            network,
            method="cn",
            step_size=0.1,
            options=TIGHT,
            newton="batch",
            compile=compile,
            trajectory=Trajectory(keep=keep),
        )
        found.append(list(gradients(lambda u, node=node: node(u, times), u0, [*parameters, times])))
    assert agree(found[1], found[0], 1e-12)


@pytest.mark.nightly
def test_stages_that_need_more_updates_are_solved_by_further_calls() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -torch.exp(u) - 30 * u**3

    u0, found, updates = 4 + random(4, 3), [], []
    for compile in (False, "aot_eager"):
        node = NeuralODE(func, method="beuler", step_size=1.0, options=TIGHT, newton="batch", compile=compile)
        found.append(list(gradients(lambda u, node=node: node(u, [0.0, 2.0]), u0, [])))
        updates.append(node.last_solve.newton_iterations)
    assert agree(found[1], found[0], 1e-12)
    # Two steps of nine updates in one call.
    assert updates[1] > 18


@pytest.mark.nightly
def test_samples_that_begin_to_depend_on_one_another_are_noticed_at_every_stage() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -3 * u + (t > 0.25).to(u.dtype) * torch.tanh(u.mean(0))

    u0, found = random(4, 3), []
    for compile in (False, "aot_eager"):
        node = NeuralODE(func, method="beuler", step_size=0.1, options=TIGHT, compile=compile)
        found.append(list(gradients(lambda u, node=node: node(u, [0.0, 0.2, 0.5]), u0, [])))
    assert agree(found[1], found[0], 1e-11)
