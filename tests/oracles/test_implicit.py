"""The implicit oracle converges at the orders of its tables, and its gradients are those of difference quotients."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.integrate import solve_ivp

from tests.oracles.arkimex_tableaux import ARKIMEX
from tests.oracles.collocation import COLLOCATION, Collocation
from tests.oracles.differences import directional_derivative
from tests.oracles.dirk_tableaux import DIRK
from tests.oracles.implicit import (
    BACKWARD_EULER,
    CRANK_NICOLSON,
    MIDPOINT,
    Theta,
    consistent_state,
    diagonal_mass,
    odeint_implicit,
    root,
    samplewise_mass,
)
from tests.oracles.implicit_tableaux import ImplicitTableau
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain
from tests.oracles.stiff_right_hand_sides import Constrained, StiffNetwork
from tests.tiers import at_night

THETAS = {
    "beuler": (BACKWARD_EULER, 1),
    "cn": (CRANK_NICOLSON, 2),
    "midpoint": (MIDPOINT, 2),
    "theta 0.6": (Theta(0.6, endpoint=False), 1),
    "theta 0.6 endpoint": (Theta(0.6, endpoint=True), 1),
}
METHODS: dict[str, tuple[Theta | ImplicitTableau | Collocation, int]] = {
    **THETAS,
    **{f"arkimex {name}": (table, table.order) for name, table in ARKIMEX.items()},
    **{f"dirk {name}": (table, table.order) for name, table in DIRK.items()},
    **{name: (table, table.order) for name, table in COLLOCATION.items()},
}
GRADIENT_METHODS = [
    *THETAS,
    "dirk s212",
    "dirk es213sal",
    "arkimex l2",
    "arkimex ars122",
    "arkimex 3",
    "gauss4",
    "radau5",
]
START = torch.tensor([1.0, 0.5], dtype=torch.float64)


def predator_and_prey(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    prey, predator = u.unbind()
    return torch.stack([prey * (1.2 - predator) + 0.1 * torch.sin(3 * t), predator * (prey - 0.8)])


def deaths(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    prey, predator = u.unbind()
    return torch.stack([-prey * predator + 0.3 * torch.cos(2 * t), -0.8 * predator])


def births(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return predator_and_prey(t, u) - deaths(t, u)


@pytest.fixture(scope="module")
def converged() -> torch.Tensor:
    end: torch.Tensor = odeint_plain(predator_and_prey, START, [0.0, 1.0], TABLEAUX["8vr"], step_size=0.01)[-1]
    return end


@pytest.mark.parametrize("name", at_night(METHODS, GRADIENT_METHODS))
def test_the_integrator_converges_at_the_order_of_the_method(name: str, converged: torch.Tensor) -> None:
    method, order = METHODS[name]
    split = isinstance(method, ImplicitTableau) and method.additive

    def error(steps: int) -> float:
        size = 1.0 / steps
        if split:
            solution = odeint_implicit(deaths, START, [0.0, 1.0], method, size, explicit=births)
        else:
            solution = odeint_implicit(predator_and_prey, START, [0.0, 1.0], method, size)
        return float((solution[-1] - converged).norm())

    steps = {1: 16, 2: 8, 3: 6, 4: 4, 5: 4, 6: 4, 7: 8, 8: 3}[order]
    assert math.log2(error(steps) / error(2 * steps)) == pytest.approx(order, abs=0.45)


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_gradients_are_those_of_difference_quotients_in_state_parameters_and_times(name: str) -> None:
    method, _ = METHODS[name]
    split = isinstance(method, ImplicitTableau) and method.additive
    module = StiffNetwork()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def loss(u0: torch.Tensor, times: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        replaced = dict(zip(names, values, strict=True))

        def part(child: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
            own = {key.removeprefix(f"{child}."): value for key, value in replaced.items() if key.startswith(child)}
            return lambda t, u: torch.func.functional_call(module.get_submodule(child), own, (t, u))

        stiff, other = part("stiff"), part("other")
        if split:
            solution = odeint_implicit(stiff, u0, times, method, 0.1, explicit=other)
        else:
            solution = odeint_implicit(lambda t, u: stiff(t, u) + other(t, u), u0, times, method, 0.1)
        return torch.sin(solution).sum()

    times = torch.tensor([0.1, 0.35, 0.5], dtype=torch.float64)
    point = [random(2, 3).requires_grad_(), times.requires_grad_(), *parameters]
    direction = [random(*value.shape, seed=7 + k) for k, value in enumerate(point)]
    found = torch.autograd.grad(loss(*point), point)
    for chosen in ([0], [1], range(2, len(point)), range(len(point))):
        along = [d if k in chosen else torch.zeros_like(d) for k, d in enumerate(direction)]
        wanted = directional_derivative(loss, point, along, step=2e-4)
        assert float(sum((g * d).sum() for g, d in zip(found, along, strict=True))) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_linear_decay_is_the_stability_function_of_the_method(name: str) -> None:
    method, _ = METHODS[name]
    rates = torch.tensor([0.3, 4.0, 1e3], dtype=torch.float64)
    found = odeint_implicit(lambda t, u: -rates * u, torch.ones_like(rates), [0.0, 0.5], method)[-1]
    z = -0.5 * rates
    if isinstance(method, Theta):
        wanted = (1 + (1 - method.theta) * z) / (1 - method.theta * z)
    else:
        rows, row_of_weights = (
            (method.matrix, method.weights)
            if isinstance(method, Collocation)
            else (method.implicit, method.implicit_weights)
        )
        matrix = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for i, row in enumerate(rows):
            matrix[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        identity = torch.eye(len(rows), dtype=torch.float64)
        weights = torch.tensor(row_of_weights, dtype=torch.float64)
        factors = [1 + x * weights @ torch.linalg.solve(identity - x * matrix, torch.ones_like(weights)) for x in z]
        wanted = torch.stack(factors)
    assert distance(found, wanted) <= 1e-11


@pytest.mark.parametrize("name", METHODS)
def test_a_regular_mass_matrix_is_the_field_divided_by_it(name: str) -> None:
    method, _ = METHODS[name]
    field, matrix = StiffNetwork(), torch.eye(3, dtype=torch.float64) + 0.3 * random(3, 3, seed=2)
    diagonal = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    u0, split = random(2, 3), isinstance(method, ImplicitTableau) and method.additive
    for dense, mass in ((matrix, samplewise_mass(matrix, 2)), (diagonal.diag(), diagonal_mass(diagonal.expand(2, 3)))):

        def divided(
            part: torch.nn.Module, dense: torch.Tensor = dense
        ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
            return lambda t, u: torch.linalg.solve(dense, part(t, u).T).T

        if split:
            found = odeint_implicit(field.stiff, u0, [0.0, 0.1], method, 0.1, explicit=field.other, mass=mass)
            explicit = divided(field.other)
            wanted = odeint_implicit(divided(field.stiff), u0, [0.0, 0.1], method, 0.1, explicit=explicit)
        else:
            found = odeint_implicit(field, u0, [0.0, 0.1], method, 0.1, mass=mass)
            wanted = odeint_implicit(divided(field), u0, [0.0, 0.1], method, 0.1)
        assert distance(found, wanted) <= 1e-12


def algebraic_part(constrained: Constrained, t: torch.Tensor, differential: torch.Tensor) -> torch.Tensor:
    """The third component for given first two, `[..., 1]`, by Newton's method on the constraint alone."""
    shape = (*differential.shape[:-1], 1)

    def residual(x: torch.Tensor) -> torch.Tensor:
        whole = torch.cat([differential, x.reshape(shape)], dim=-1)
        return constrained.constraint(t, whole).reshape(-1)

    return root(residual, torch.zeros(math.prod(shape), dtype=torch.float64)).reshape(shape)


@pytest.mark.parametrize("name", [*THETAS, "dirk s212", "dirk 657a", "radau3", "gauss4"])
def test_an_algebraic_equation_is_solved_out_of_the_system(name: str) -> None:
    """Of the differential variables the numbers are those of the system with the algebraic one put in."""
    method, _ = METHODS[name]
    constrained, mass = Constrained(), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    parameters = list(constrained.parameters())
    start = random(2, 2).requires_grad_()

    def reduced(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        slopes: torch.Tensor = constrained(t, torch.cat([u, algebraic_part(constrained, t, u)], dim=-1))
        return slopes[..., :2]

    zero = torch.zeros((), dtype=torch.float64)
    u0 = torch.cat([start, algebraic_part(constrained, zero, start)], dim=-1)
    whole_mass = diagonal_mass(mass.expand(2, 3))
    found = odeint_implicit(constrained, u0, [0.0, 0.1, 0.3], method, 0.1, mass=whole_mass)[..., :2]
    wanted = odeint_implicit(reduced, start, [0.0, 0.1, 0.3], method, 0.1)
    assert distance(found, wanted) <= 1e-12
    for one, other in zip(
        torch.autograd.grad(torch.sin(found).sum(), [start, *parameters]),
        torch.autograd.grad(torch.sin(wanted).sum(), [start, *parameters]),
        strict=True,
    ):
        assert distance(one, other) <= 1e-11


def test_backward_euler_converges_to_radau_on_a_system_with_an_algebraic_equation() -> None:
    constrained = Constrained()
    zero, start = torch.zeros((), dtype=torch.float64), random(2)
    mass = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))

    def reduced(time: float, values: object) -> object:
        t, u = torch.tensor(time, dtype=torch.float64), torch.as_tensor(values)
        with torch.no_grad():
            return constrained(t, torch.cat([u, algebraic_part(constrained, t, u)]))[:2].numpy()

    exact = solve_ivp(reduced, (0.0, 1.0), start.numpy(), method="Radau", rtol=1e-6, atol=1e-8).y[:, -1]
    u0 = torch.cat([start, algebraic_part(constrained, zero, start)])
    with torch.no_grad():
        coarse, fine = (
            odeint_implicit(constrained, u0, [0.0, 1.0], BACKWARD_EULER, 1 / steps, mass=mass)[-1, :2]
            for steps in (8, 16)
        )
    errors = [float((end - torch.as_tensor(exact)).norm()) for end in (coarse, fine)]
    assert errors[1] <= 0.02
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)


def van_der_pol(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return torch.stack([u[1], 50 * ((1 - u[0] ** 2) * u[1] - u[0])])


@pytest.fixture(scope="module")
def oscillated() -> torch.Tensor:
    end = solve_ivp(
        lambda t, u: van_der_pol(torch.tensor(t), torch.as_tensor(u)).numpy(),
        (0.0, 0.5),
        [2.0, 0.0],
        method="Radau",
        rtol=1e-10,
        atol=1e-12,
    )
    return torch.as_tensor(end.y[:, -1])


@pytest.mark.parametrize(
    ("name", "step_size", "tolerance"),
    [
        ("dirk es325sal", 0.025, 2e-6),
        ("dirk es8516sal", 0.05, 1e-6),
        ("arkimex 5", 0.025, 1e-5),
        ("radau5", 0.025, 1e-6),
    ],
)
def test_a_stiff_oscillator_is_solved_as_radau_solves_it(
    name: str, step_size: float, tolerance: float, oscillated: torch.Tensor
) -> None:
    start = torch.tensor([2.0, 0.0], dtype=torch.float64)
    found = odeint_implicit(van_der_pol, start, [0.0, 0.5], METHODS[name][0], step_size)[-1]
    assert distance(found, oscillated) <= tolerance


def test_a_consistent_state_solves_the_algebraic_equations_and_keeps_the_other_part() -> None:
    constrained, u0 = Constrained(), random(2, 3).requires_grad_()
    square = torch.eye(3, dtype=torch.float64) + 0.3 * random(3, 3, seed=2)
    singular = square @ torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)) @ square.T
    for matrix in (torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)), singular):
        mass = samplewise_mass(matrix, 2)

        def found(start: torch.Tensor, mass: torch.Tensor = mass) -> torch.Tensor:
            return consistent_state(constrained, start, 0.3, mass)

        state = found(u0)
        assert distance(mass @ state.reshape(-1), mass @ u0.reshape(-1)) <= 1e-14
        # The rows of M span where M M^+ projects to: what it leaves of f is the algebraic equations.
        slopes = constrained(torch.tensor(0.3, dtype=torch.float64), state).reshape(-1)
        rest = slopes - mass @ torch.linalg.pinv(mass) @ slopes
        assert float(rest.abs().max().detach()) <= 1e-13
        point, direction = [u0], [random(2, 3, seed=4)]
        (gradient,) = torch.autograd.grad(torch.sin(state).sum(), point)
        wanted = directional_derivative(lambda start: torch.sin(found(start)).sum(), point, direction)
        assert float((gradient * direction[0]).sum()) == pytest.approx(wanted, rel=1e-9)


def test_time_runs_backward_from_the_end_to_the_start() -> None:
    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -u * t

    there = odeint_implicit(field, START, [0.0, 1.0], DIRK["es8516sal"], 0.2)[-1]
    back = odeint_implicit(field, there, [1.0, 0.0], DIRK["es8516sal"], 0.2)[-1]
    torch.testing.assert_close(back, START, rtol=1e-10, atol=0)


def test_equations_without_a_solution_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="not converged"):
        root(lambda x: x**2 + 1, torch.full((1,), 0.7, dtype=torch.float64))
