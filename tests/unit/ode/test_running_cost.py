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
from tests.oracles.implicit import BACKWARD_EULER, CRANK_NICOLSON, MIDPOINT, Theta, odeint_implicit
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


THETA: dict[str, tuple[Theta, dict[str, Any]]] = {
    "beuler": (BACKWARD_EULER, {"method": "beuler", "newton": "petsc", "options": EXACT}),
    "cn": (CRANK_NICOLSON, {"method": "cn", "newton": "petsc", "options": EXACT}),
    "midpoint": (MIDPOINT, {"method": "theta", "newton": "petsc", "options": EXACT}),
    "cn by batches": (CRANK_NICOLSON, {"method": "cn", "newton": "batch"}),
    "beuler with a checkpoint": (
        BACKWARD_EULER,
        {
            "method": "beuler",
            "newton": "petsc",
            "options": EXACT,
            "trajectory": Trajectory(keep="solution", ram_slots=1),
        },
    ),
    "cn with stages": (
        CRANK_NICOLSON,
        {"method": "cn", "newton": "petsc", "options": EXACT, "trajectory": Trajectory(keep="stages", ram_slots=2)},
    ),
}


def by_theta(table: Theta, u: torch.Tensor, t: torch.Tensor, size: float) -> tuple[torch.Tensor, dict[str, Any]]:
    """States and integrals at the times by a theta method in plain torch."""
    states, sums = [u], {name: torch.zeros_like(value) for name, value in cost(t[0], u).items()}
    integrals = {name: [value] for name, value in sums.items()}
    for begin, end in pairwise(t):
        count = max(1, round(float((end - begin).detach()) / size))
        step = (end - begin) / count
        for number in range(count):
            start = begin + number * step
            after = odeint_implicit(FUNC, u, torch.stack([start, start + step]), table)[-1]
            if table.endpoint:
                ends = (1 - table.theta, cost(start, u)), (table.theta, cost(start + step, after))
            else:
                stage = u + table.theta * (after - u)
                ends = ((1.0, cost(start + table.theta * step, stage)),)
            for weight, rates in ends:
                sums = {name: value + step * weight * rates[name] for name, value in sums.items()}
            u = after
        states.append(u)
        for name, value in sums.items():
            integrals[name].append(value)
    return torch.stack(states), {name: torch.stack(values) for name, values in integrals.items()}


@pytest.mark.parametrize(("table", "settings"), THETA.values(), ids=THETA)
def test_theta_methods_have_their_own_quadrature_with_its_gradient(table: Theta, settings: dict[str, Any]) -> None:
    u0, t = U0.clone().requires_grad_(), torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    wanted = by_theta(table, u0, t, 0.2)
    found = odeint(FUNC, u0, t, step_size=0.2, integrate=cost, **settings)
    assert distance(found.u, wanted[0]) <= 1e-12
    assert distance(list(found.integral.values()), list(wanted[1].values())) <= 1e-12
    inputs = [u0, t, *PARAMETERS]
    by_hand = torch.autograd.grad(loss(*wanted), inputs)
    assert distance(torch.autograd.grad(loss(found.u, found.integral), inputs), by_hand) <= 1e-11


def test_a_large_cost_leaves_the_state_of_an_implicit_method_as_it_is() -> None:
    settings: dict[str, Any] = {"method": "cn", "step_size": 0.2, "newton": "petsc"}
    plain = odeint(FUNC, U0, TIMES, **settings)
    found = odeint(FUNC, U0, TIMES, integrate=lambda t, u: 1e9 * u.sum(), **settings)
    assert torch.equal(found.u, plain)


def test_steps_of_a_theta_method_with_error_control_have_a_cost() -> None:
    u0 = U0.clone().requires_grad_()
    settings: dict[str, Any] = {"method": "cn", "rtol": 1e-3, "options": EXACT}
    u, integral = odeint(FUNC, u0, TIMES, integrate=cost, save="steps", observe=lambda t, u: u.sum(), **settings)
    t, r = odeint(FUNC, u0, TIMES, observe=cost, save="steps", **settings)
    sizes = t.diff()
    inside = 0.5 * sizes * (r["effort"][1:] + r["effort"][:-1])
    wanted = torch.cat([inside.new_zeros(1), inside.cumsum(0)])
    assert torch.equal(u.t, t)
    assert distance(integral["effort"], wanted) <= 1e-13
    found, by_hand = (torch.autograd.grad(one.sum(), [u0, *FUNC.parameters()]) for one in (integral["effort"], wanted))
    assert distance(found, by_hand) <= 1e-12


def test_integrals_by_an_implicit_method_refuse_second_derivatives() -> None:
    u0 = U0.clone().requires_grad_()
    _, integral = odeint(FUNC, u0, TIMES, method="cn", step_size=0.2, integrate=cost)
    (first,) = torch.autograd.grad(integral["effort"].sum(), u0, create_graph=True)
    with pytest.raises(ConfigurationError, match="integrate: its integrals by an implicit method have no second"):
        torch.autograd.grad(first.sum(), u0)


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
        ({"integrate": cost, "method": "arkimex_3"}, ConfigurationError, "integrate: method = 'arkimex_3': must be"),
        ({"integrate": lambda t, u: u.sum() + 1j}, TypeError, "integrate returned complex numbers"),
        ({"integrate": lambda t, u: u.sum() + 1j, "method": "cn"}, TypeError, "integrate returned complex numbers"),
        ({"integrate": lambda t, u: u.zero_(), "method": "cn"}, ConfigurationError, "it writes to the state"),
        ({"integrate": lambda t, u: u[: int(t * 9)], "method": "cn"}, ValueError, "must be the same at all times"),
    ],
)
def test_a_cost_that_cannot_be_integrated_is_refused(settings: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        odeint(FUNC, U0, TIMES, step_size=0.2, **settings)
