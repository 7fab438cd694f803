"""`integrate`: the integral of a running cost by the quadrature of the method, with its exact gradient."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import Integrated, NeuralODE, Trajectory, odeint
from pnode_dist.errors import ConfigurationError
from tests.oracles.implicit import CRANK_NICOLSON, odeint_implicit
from tests.oracles.right_hand_sides import Network, distance, random
from tests.oracles.runge_kutta import TABLEAUX, Tableau

TIMES = [0.0, 0.4, 1.0]
U0, FUNC, PRICE = random(4, 3), Network(), nn.Linear(3, 2).double()
PARAMETERS = [*FUNC.parameters(), *PRICE.parameters()]
EXACT = {"snes_rtol": 1e-13, "ksp_rtol": 1e-13}


def cost(t: torch.Tensor, u: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"effort": FUNC(t, u).square().sum(), "price": PRICE(u).sin() * t}


def by_quadrature(table: Tableau, u: torch.Tensor, t: torch.Tensor, size: float) -> tuple[torch.Tensor, dict[str, Any]]:
    """States and integrals at the times, by the weights of the method at its stages, in plain torch."""
    states, sums = [u], {name: torch.zeros_like(value) for name, value in cost(t[0], u).items()}
    integrals = {name: [value] for name, value in sums.items()}
    for begin, end in pairwise(t):
        count = max(1, round(float((end - begin).detach()) / size))
        step = (end - begin) / count
        for number in range(count):
            slopes, start = [], begin + number * step
            for row, node in zip(table.stages, table.nodes, strict=True):
                stage = u + step * sum((float(a) * k for a, k in zip(row, slopes, strict=False)), torch.zeros_like(u))
                slopes.append(FUNC(start + float(node) * step, stage))
                weight = float(table.weights[len(slopes) - 1])
                rates = cost(start + float(node) * step, stage)
                sums = {name: value + step * weight * rates[name] for name, value in sums.items()}
            u = u + step * sum((float(b) * k for b, k in zip(table.weights, slopes, strict=True)), torch.zeros_like(u))
        states.append(u)
        for name, value in sums.items():
            integrals[name].append(value)
    return torch.stack(states), {name: torch.stack(values) for name, values in integrals.items()}


def loss(states: torch.Tensor, integral: dict[str, torch.Tensor]) -> torch.Tensor:
    return states.sin().sum() + integral["effort"].square().sum() + integral["price"].cos().sum()


@pytest.mark.parametrize("budget", [None, Trajectory(keep="solution", ram_slots=1), Trajectory(keep="stages")], ids=str)
@pytest.mark.parametrize("name", ["rk4", "bosh3", "midpoint"])
def test_the_quadrature_is_that_of_the_method_with_its_gradient(name: str, budget: Trajectory | None) -> None:
    table = TABLEAUX[{"rk4": "4", "bosh3": "3bs", "midpoint": "2b"}[name]]
    u0, t = U0.clone().requires_grad_(), torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    wanted = by_quadrature(table, u0, t, 0.2)
    found = odeint(FUNC, u0, t, method=name, step_size=0.2, integrate=cost, trajectory=budget)
    assert isinstance(found, Integrated)
    assert distance(found.u, wanted[0]) <= 1e-13
    assert distance(list(found.integral.values()), list(wanted[1].values())) <= 1e-13
    inputs = [u0, t, *PARAMETERS]
    by_hand = torch.autograd.grad(loss(*wanted), inputs)
    assert distance(torch.autograd.grad(loss(found.u, found.integral), inputs), by_hand) <= 1e-12


def test_the_cost_observed_at_all_steps_gives_the_quadrature_of_an_implicit_method() -> None:
    u0 = U0.clone().requires_grad_()
    settings: dict[str, Any] = {"method": "cn", "step_size": 0.2, "newton": "petsc", "options": EXACT}
    t, r = odeint(FUNC, u0, TIMES, observe=lambda t, u: FUNC(t, u).square().sum(), save="steps", **settings)
    found = torch.trapezoid(r, t)
    states = odeint_implicit(FUNC, u0, t.tolist(), CRANK_NICOLSON)
    wanted = torch.trapezoid(torch.stack([FUNC(time, u).square().sum() for time, u in zip(t, states, strict=True)]), t)
    inputs = [u0, *FUNC.parameters()]
    assert distance(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs)) <= 1e-12


@pytest.mark.parametrize("adaptor", ["basic", "pid"])
def test_error_control_takes_the_steps_of_the_solve_without_the_cost(adaptor: str) -> None:
    settings: dict[str, Any] = {"rtol": 1e-5, "save": "steps", "adaptor": adaptor}
    plain = odeint(FUNC, U0, TIMES, **settings)
    found = odeint(FUNC, U0, TIMES, integrate=lambda t, u: 1e6 * torch.sin(1e3 * t), **settings)
    # Up to the rounding of the error estimate, which is small beside the state.
    assert distance(found.u.t, plain.t) <= 1e-7
    assert found.integral.shape == plain.t.shape


def test_the_integral_converges_to_the_exact_one() -> None:
    def decay(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -u

    u0 = torch.ones((), dtype=torch.float64)
    _, integral = odeint(decay, u0, [0.0, 1.0], step_size=0.01, integrate=lambda t, u: u.square(), last_only=True)
    assert integral.item() == pytest.approx((1 - math.exp(-2)) / 2, rel=1e-9)


def test_it_joins_observations_saved_steps_and_a_consumer() -> None:
    settings: dict[str, Any] = {"step_size": 0.2, "integrate": cost, "observe": lambda t, u: u.sum(-1), "save": "steps"}
    u, integral = odeint(FUNC, U0, TIMES, **settings)
    assert (u.u.shape, integral["price"].shape) == ((6, 4), (6, 4, 2))
    taken: list[Integrated] = []
    with torch.no_grad():
        odeint(FUNC, U0, TIMES, on_output=lambda t, value: taken.append(value), **settings)
    assert torch.equal(torch.stack([value.u for value in taken]), u.u)
    assert torch.equal(torch.stack([value.integral["effort"] for value in taken]), integral["effort"].detach())


def test_a_module_keeps_its_solver_and_plans_with_the_cost() -> None:
    node = NeuralODE(FUNC, step_size=0.2, integrate=cost)
    first, second = node(U0, TIMES), node(U0, TIMES)
    assert node.last_solve.function_evaluations == 20
    assert torch.equal(first.integral["price"], second.integral["price"])
    assert node.plan(U0.clone().requires_grad_(), TIMES).chosen.steps == 5


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"integrate": 3}, TypeError, r"integrate must be callable as integrate\(t, u, \*args\), got int"),
        ({"integrate": lambda t, u: 1.0}, TypeError, "integrate returned float: must be a floating-point tensor"),
        ({"integrate": cost, "method": "cn"}, ConfigurationError, "integrate: method = 'cn' solves equations"),
    ],
)
def test_a_cost_that_cannot_be_integrated_is_refused(settings: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        odeint(FUNC, U0, TIMES, step_size=0.2, **settings)
