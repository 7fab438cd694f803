"""`observe`: functions of the states in place of the states, with their gradient at every level and budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import jacfwd, jacrev, vmap

from pnode_dist import NeuralODE, Trajectory, odeint
from pnode_dist.errors import ConfigurationError, RecomputationError
from tests.oracles.implicit import CRANK_NICOLSON, odeint_implicit
from tests.oracles.right_hand_sides import Network, distance, gradients, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.0, 0.4, 0.5, 1.0]
U0 = random(4, 3)
FUNC, READING = Network(), nn.Linear(3, 2).double()
PARAMETERS = [*FUNC.parameters(), *READING.parameters()]
EXACT = {"snes_rtol": 1e-13, "ksp_rtol": 1e-13}
SETTINGS: dict[str, dict[str, Any]] = {
    "all graphs": {"method": "rk4", "step_size": 0.1},
    "stages": {"method": "rk4", "step_size": 0.1, "trajectory": Trajectory(keep="stages")},
    "one checkpoint": {"method": "rk4", "step_size": 0.1, "trajectory": Trajectory(keep="solution", ram_slots=1)},
    "error control": {"rtol": 1e-5},
    "error control, two checkpoints": {"rtol": 1e-5, "trajectory": Trajectory(keep="solution", ram_slots=2)},
    "implicit": {"method": "cn", "step_size": 0.25, "newton": "petsc", "options": EXACT},
    "implicit, one checkpoint": {
        "method": "beuler",
        "step_size": 0.25,
        "newton": "petsc",
        "options": EXACT,
        "trajectory": Trajectory(keep="solution", ram_slots=1),
    },
    "batch": {"method": "cn", "step_size": 0.25, "newton": "batch"},
}


def reading(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """An observation with parameters, of the time too."""
    found: torch.Tensor = READING(torch.sin(u)) * (1 + t)
    return found


def several(t: torch.Tensor, u: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "reading": READING(torch.sin(u)) * (1 + t),
        "energy": u.square().sum(),
        "spectrum": torch.fft.rfft(u, dim=-1),
    }


def of_states(states: torch.Tensor, times: Any = TIMES) -> torch.Tensor:
    return torch.stack([reading(t, u) for t, u in zip(torch.as_tensor(times, dtype=u0_type()), states, strict=True)])


def u0_type() -> torch.dtype:
    return U0.dtype


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_observation_is_that_of_the_states_with_its_gradient(settings: dict[str, Any]) -> None:
    def loss(observes: bool) -> tuple[torch.Tensor, ...]:
        u0, t = U0.clone().requires_grad_(), torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
        if observes:
            found = odeint(FUNC, u0, t, observe=several, **settings)
        else:
            every = [several(time, u) for time, u in zip(t, odeint(FUNC, u0, t, **settings), strict=True)]
            found = {name: torch.stack([one[name] for one in every]) for name in every[0]}
        total = found["reading"].square().sum() + found["energy"].sin().sum() + found["spectrum"].abs().sum()
        return total.detach(), *torch.autograd.grad(total, [u0, t, *PARAMETERS])

    assert distance(loss(True), loss(False)) <= 1e-13


def test_an_observed_explicit_solve_has_the_gradient_of_plain_torch() -> None:
    wanted = gradients(lambda u: of_states(odeint_plain(FUNC, u, TIMES, TABLEAUX["4"], 0.1)), U0, PARAMETERS)
    for budget in (None, Trajectory(keep="solution", ram_slots=1), Trajectory(keep="stages")):
        found = gradients(
            lambda u, budget=budget: odeint(FUNC, u, TIMES, step_size=0.1, observe=reading, trajectory=budget),
            U0,
            PARAMETERS,
        )
        assert distance(found, wanted) <= 1e-12


def test_an_observed_implicit_solve_has_the_gradient_of_plain_torch() -> None:
    wanted = gradients(lambda u: of_states(odeint_implicit(FUNC, u, TIMES, CRANK_NICOLSON, 0.25)), U0, PARAMETERS)
    found = gradients(
        lambda u: odeint(FUNC, u, TIMES, method="cn", step_size=0.25, observe=reading, options=EXACT, newton="petsc"),
        U0,
        PARAMETERS,
    )
    assert distance(found, wanted) <= 1e-12


def test_compiled_segments_are_observed_alike() -> None:
    plain = NeuralODE(FUNC, step_size=0.1, observe=reading)
    compiled = NeuralODE(FUNC, step_size=0.1, observe=reading, compile="eager")
    wanted, found = (gradients(lambda u, node=node: node(u, TIMES), U0, PARAMETERS) for node in (plain, compiled))
    assert distance(found, wanted) <= 1e-13


def test_of_the_last_state_alone_it_has_no_axis_of_times() -> None:
    found = odeint(FUNC, U0, TIMES, step_size=0.1, observe=several, last_only=True)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "reading": (4, 2),
        "energy": (),
        "spectrum": (4, 2),
    }
    wanted = gradients(lambda u: odeint(FUNC, u, TIMES, step_size=0.1, observe=reading)[-1], U0, PARAMETERS)
    last = gradients(lambda u: odeint(FUNC, u, TIMES, step_size=0.1, observe=reading, save="last"), U0, PARAMETERS)
    assert distance(last, wanted) <= 1e-14


def test_of_one_time_it_is_that_of_the_initial_state() -> None:
    wanted = gradients(lambda u: reading(torch.tensor(0.3, dtype=torch.float64), u)[None], U0, PARAMETERS)
    found = gradients(lambda u: odeint(FUNC, u, [0.3], observe=reading), U0, PARAMETERS)
    assert distance(found, wanted) <= 1e-15


def test_a_tuple_state_is_observed_whole_and_with_extra_arguments() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def func(t: torch.Tensor, u: tuple[torch.Tensor, ...], scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return scale * u[1], -u[0]

    def energy(t: torch.Tensor, u: tuple[torch.Tensor, ...], scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return u[0].square().sum() + scale * u[1].square().sum(), u[0]

    pair = (random(3), random(3, seed=2))
    energies, positions = odeint(func, pair, TIMES, step_size=0.01, observe=energy, args=(scale,))
    assert energies.tolist() == pytest.approx([energies[0].item()] * 4, rel=1e-8)
    states = odeint(func, pair, TIMES, step_size=0.01, args=(scale,))
    (wanted,) = torch.autograd.grad(energy(None, (states[0][-1], states[1][-1]), scale)[0], scale)  # type: ignore[arg-type]
    (found,) = torch.autograd.grad(energies[-1], scale)
    assert torch.equal(positions, states[0])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("settings", [{"method": "rk4", "step_size": 0.1}, {"rtol": 1e-5}], ids=["fixed", "adaptive"])
def test_its_second_derivatives_are_those_of_the_states(settings: dict[str, Any]) -> None:
    def products(observes: bool) -> tuple[torch.Tensor, ...]:
        u0 = U0.clone().requires_grad_()
        found = (
            odeint(FUNC, u0, TIMES, observe=reading, **settings)
            if observes
            else of_states(odeint(FUNC, u0, TIMES, **settings))
        )
        first = torch.autograd.grad(found.sin().sum(), [u0, *PARAMETERS], create_graph=True)
        total = sum((part.square().sum() for part in first), torch.zeros(()))
        return torch.autograd.grad(total, [u0, *PARAMETERS])

    assert distance(products(True), products(False)) <= 1e-12


def test_transforms_of_torch_see_the_observation() -> None:
    def observed(u: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = odeint(FUNC, u, TIMES, step_size=0.1, observe=reading)
        return found

    def naive(u: torch.Tensor) -> torch.Tensor:
        return of_states(odeint(FUNC, u, TIMES, step_size=0.1))

    for transform in (jacrev, jacfwd):
        assert distance(transform(observed)(U0), transform(naive)(U0)) <= 1e-13
    batch = random(5, 4, 3)
    assert distance(vmap(observed)(batch), vmap(naive)(batch)) <= 1e-14


def test_tangents_follow_the_observations() -> None:
    node = NeuralODE(FUNC, step_size=0.1, observe=several)
    weight = READING.weight
    values, tangents = node.jvp(U0, TIMES, torch.ones_like(U0), {weight: torch.ones_like(weight)})
    steps = 1e-6

    def moved(sign: int) -> torch.Tensor:
        def shifted(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = nn.functional.linear(torch.sin(u), weight + sign * steps, READING.bias) * (1 + t)
            return found

        with torch.no_grad():
            found: torch.Tensor = odeint(FUNC, U0 + sign * steps, TIMES, step_size=0.1, observe=shifted)
        return found

    assert distance(tangents["reading"], (moved(1) - moved(-1)) / (2 * steps)) <= 1e-8
    assert list(values) == list(tangents) == ["reading", "energy", "spectrum"]


def test_checkpointing_by_torch_recomputes_the_observations() -> None:
    def solve(u: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = odeint(FUNC, u, TIMES, step_size=0.1, observe=reading)
        return found

    wanted = gradients(solve, U0, PARAMETERS)
    again = gradients(
        lambda u: torch.utils.checkpoint.checkpoint(solve, u, use_reentrant=False),  # type: ignore[no-untyped-call]
        U0,
        PARAMETERS,
    )
    assert distance(again, wanted) == 0.0


def test_an_observation_that_differs_when_it_is_recomputed_is_refused() -> None:
    u0 = U0.clone().requires_grad_()
    found = odeint(FUNC, u0, TIMES, step_size=0.1, observe=lambda t, u: torch.rand_like(u) * u)
    with pytest.raises(RecomputationError, match="observe at t = 1, recomputed for the gradient, differs"):
        found.sum().backward()


@pytest.mark.parametrize(
    ("observe", "error", "text"),
    [
        (3, TypeError, r"observe must be callable as observe\(t, u, \*args\), got int"),
        (lambda t, u: 1, TypeError, "observe returned int: must be a floating-point tensor"),
        (lambda t, u: u > 0, TypeError, "observe returned a tensor of torch.bool"),
        (lambda t, u: [u, "x"], TypeError, "observe returned a tuple of a tensor of torch.float64, str"),
        (lambda t, u: u.zero_(), ConfigurationError, "observe: it writes to the state"),
        (lambda t, u: u[: int(t * 10)], ValueError, r"shape \(4, 3\) at t = 0.4, and \(0, 3\) before"),
        (lambda t, u: u if t < 0.2 else (u,), TypeError, "at t = 0.4, and another form before"),
        (lambda t, u: u * LOST[0], ValueError, "observe depends on a tensor of shape"),
    ],
)
def test_an_observation_that_cannot_be_used_is_refused(observe: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        odeint(FUNC, U0.clone().requires_grad_(), TIMES, step_size=0.1, observe=observe).sum().backward()


class _Lost:
    """Parameters behind an index, where no search finds them."""

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.ones((), dtype=torch.float64, requires_grad=True)


LOST = _Lost()


def test_missing_values_pass_through_an_observation() -> None:
    found = odeint(FUNC, U0, TIMES, step_size=0.1, observe=lambda t, u: u.sum() * math.nan)
    assert torch.isnan(found).all()


def test_an_observation_of_a_complex_state_gets_and_returns_complex_numbers() -> None:
    def turn(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 1j * u

    def squared(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u * u

    u0 = torch.complex(random(3), random(3, seed=2)).requires_grad_()
    found = odeint(turn, u0, TIMES, step_size=0.1, observe=squared)
    states = odeint(turn, u0, TIMES, step_size=0.1)
    assert distance(torch.view_as_real(found), torch.view_as_real(states.square())) <= 1e-15
    wanted = torch.autograd.grad(states.square().abs().sum(), u0)
    assert distance(torch.autograd.grad(found.abs().sum(), u0), wanted) <= 1e-13
    saved, cost = odeint(turn, u0, TIMES, step_size=0.1, save="steps", integrate=lambda t, u: u.abs().sum())
    assert saved.u.dtype is torch.complex128
    assert cost[-1].item() == pytest.approx(u0.abs().sum().item(), rel=1e-5)
