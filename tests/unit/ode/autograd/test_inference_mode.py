"""Solves in inference mode, and right-hand sides of t alone, by every family of methods."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pnode_dist import NeuralODE, odeint
from pnode_dist.ode.methods import METHODS
from tests.oracles.right_hand_sides import Network, distance, random

NAMES = ["rk4", "ssp_rks2", "beuler", "cn", "theta", "arkimex_3", "dirk_es213sal", "radau3", "rosw_ra34pw2", "bdf"]
EVERY_METHOD = pytest.mark.parametrize("name", NAMES)
# The factor by which a step of size h changes du/dt = -u.
FACTORS = {
    "rk4": lambda h: 1 - h + h**2 / 2 - h**3 / 6 + h**4 / 24,
    "beuler": lambda h: 1 / (1 + h),
    "cn": lambda h: (1 - h / 2) / (1 + h / 2),
}
TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-13, "snes_stol": 1e-14, "ksp_rtol": 1e-13, "ksp_atol": 1e-50}


def options(name: str) -> dict[str, Any]:
    return {"options": TIGHT} if METHODS[name].implicit else {}


def time_alone(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return t * torch.ones_like(u)


def test_every_family_is_among_the_methods() -> None:
    # Symplectic methods need states of pairs, see `test_symplectic.py`.
    assert {METHODS[name].family for name in NAMES} == {method.family for method in METHODS.values()} - {"symplectic"}


@EVERY_METHOD
def test_values_in_inference_mode_are_those_of_no_grad(name: str) -> None:
    network, u0 = Network(), random(4, 3)
    node = NeuralODE(network, method=name, step_size=0.25)
    with torch.no_grad():
        wanted = node(u0, [0.0, 1.0])
    with torch.inference_mode():
        found, of_function = node(u0, [0.0, 1.0]), odeint(network, u0, [0.0, 1.0], method=name, step_size=0.25)
    assert torch.equal(found, wanted)
    assert torch.equal(of_function, wanted)


@pytest.mark.parametrize("name", FACTORS)
def test_decay_in_inference_mode_is_the_power_of_the_method_s_factor(name: str) -> None:
    with torch.inference_mode():
        # A state that is itself of inference mode, as a model in front of the solve makes it.
        u0 = torch.ones(2, dtype=torch.float64)
        found = odeint(lambda t, u: -u, u0, [0.0, 1.0], method=name, step_size=0.25, **options(name))[-1]
        assert found.tolist() == pytest.approx([FACTORS[name](0.25) ** 4] * 2, rel=1e-10)


@EVERY_METHOD
def test_arguments_of_inference_mode_are_taken(name: str) -> None:
    with torch.inference_mode():
        rate, u0 = torch.full((1,), 0.5, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        found = odeint(lambda t, u, k: -k * u, u0, [0.0, 1.0], args=(rate,), method=name, step_size=0.01)[-1]
        assert found.tolist() == pytest.approx([math.exp(-0.5)] * 2, rel=5e-3)


def test_a_gradient_is_right_after_a_solve_in_inference_mode() -> None:
    network, u0 = Network(), random(4, 3)
    node, fresh = (NeuralODE(network, method="cn", step_size=0.25) for _ in range(2))
    with torch.inference_mode():
        node(u0, [0.0, 1.0])

    def gradient(solve: NeuralODE) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(solve(u0, [0.0, 1.0])[-1].square().sum(), list(network.parameters()))

    assert distance(gradient(node), gradient(fresh)) == 0.0


@EVERY_METHOD
@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.0], [0.5, -0.5, -1.0]])
def test_a_function_of_time_alone_is_integrated_forward_and_backward(name: str, times: list[float]) -> None:
    with torch.no_grad():
        found = odeint(time_alone, torch.ones(2, dtype=torch.float64), times, method=name, step_size=0.25)[-1]
    exact = 1 + (times[-1] ** 2 - times[0] ** 2) / 2
    # A linear function of time is integrated exactly from second order on; by Euler's backward method each step of size
    # h is off by h^2 / 2.
    error = abs(times[-1] - times[0]) * 0.25 / 2
    expected = exact + (error if METHODS[name].order == 1 else 0.0)
    if name == "bdf":
        # PETSc starts it with steps of lower order.
        assert found.tolist() == pytest.approx([exact] * 2, abs=0.06)
    else:
        assert found.tolist() == pytest.approx([expected] * 2, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].adjoint != "none"])
@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.0]])
def test_the_gradient_of_a_function_of_time_and_a_parameter_is_exact(name: str, times: list[float]) -> None:
    # u(t) = u(0) + w q with the quadrature q of t that the method stands for: linear in both.
    w = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    u0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    found = odeint(lambda t, u: w * t * torch.ones_like(u), u0, times, method=name, step_size=0.25)[-1]
    by_state, by_rate = torch.autograd.grad(found.sum(), [u0, w])
    assert by_state.tolist() == pytest.approx([1.0, 1.0], rel=1e-14)
    assert by_rate.item() == pytest.approx(((found - 1) / 2).sum().item(), rel=1e-12)
    if METHODS[name].order > 1:
        assert by_rate.item() == pytest.approx(times[-1] ** 2 - times[0] ** 2, rel=1e-12)
