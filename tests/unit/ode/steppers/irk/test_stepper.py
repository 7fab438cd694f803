"""Gauss and Radau methods: their orders, invariants, second derivatives, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pnode_dist import ConfigurationError, ConvergenceError, NeuralODE, odeint
from pnode_dist.ode.methods import METHODS
from tests.oracles.collocation import COLLOCATION
from tests.oracles.implicit import odeint_implicit
from tests.oracles.right_hand_sides import Network, distance, random

NAMES = list(COLLOCATION)
TIGHT = {"snes_rtol": 1e-13, "snes_stol": 1e-15}
BOTH = pytest.mark.parametrize("newton", ["batch", "petsc"])


def driven(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    prey, predator = u.unbind(-1)
    return torch.stack([prey * (1.2 - predator) + 0.1 * torch.sin(3 * t), predator * (prey - 0.8)], dim=-1)


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_the_error_falls_with_the_order_where_f_depends_on_time(name: str, newton: str) -> None:
    u0 = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    exact = odeint(driven, u0, [0.0, 2.0], method="dopri8", step_size=0.02)[-1]

    def error(steps: int) -> float:
        end = odeint(driven, u0, [0.0, 2.0], method=name, step_size=2.0 / steps, options=TIGHT, newton=newton)[-1]
        return distance(end, exact)

    assert math.log2(error(6) / error(12)) == pytest.approx(METHODS[name].order, abs=0.25)


@pytest.mark.parametrize("name", ["gauss4", "gauss6"])
def test_gauss_methods_keep_a_quadratic_invariant(name: str) -> None:
    axis = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)

    def turning(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        # |u| is kept, and the axis depends on the state.
        return torch.linalg.cross(axis + u.square(), u)

    u0 = random(4, 3)
    end = odeint(turning, u0, [0.0, 10.0], method=name, step_size=0.1, options=TIGHT)[-1]
    assert distance(end.norm(dim=1), u0.norm(dim=1)) <= 1e-12
    assert distance(end, u0) > 0.1


@BOTH
@pytest.mark.parametrize("name", ["gauss6", "radau3"])
def test_second_derivatives_are_those_of_plain_torch_s_gradient(name: str, newton: str) -> None:
    network, times = Network(), [0.0, 0.4]
    options = {**TIGHT, "ksp_rtol": 1e-12} if newton == "petsc" else TIGHT
    node = NeuralODE(network, method=name, step_size=0.2, options=options, newton=newton)
    direction = random(2, 3, seed=5)
    u0 = random(2, 3).requires_grad_()
    (first,) = torch.autograd.grad(torch.sin(node(u0, times)[-1]).sum(), u0, create_graph=True)
    (found,) = torch.autograd.grad((first * direction).sum(), u0)

    def gradient(shift: float) -> torch.Tensor:
        moved = (random(2, 3) + shift * direction).requires_grad_()
        end = odeint_implicit(network, moved, times, COLLOCATION[name], 0.2)[-1]
        (result,) = torch.autograd.grad(torch.sin(end).sum(), moved)
        return result

    step = 1e-3
    wanted = (8 * (gradient(step) - gradient(-step)) - (gradient(2 * step) - gradient(-2 * step))) / (12 * step)
    assert distance(found, wanted) <= 1e-9


@BOTH
def test_jumps_inside_a_solve_end_steps_and_keep_the_order(newton: str) -> None:
    def jumping(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.where(t < 0.3, 1.0, -2.0) - u

    u0 = torch.zeros(1, 1, dtype=torch.float64)
    end = odeint(jumping, u0, [0.0, 1.0], method="radau5", step_size=0.1, jumps=[0.3], options=TIGHT, newton=newton)
    exact = -2.0 + (2.0 + 1.0 - math.exp(-0.3)) * math.exp(-0.7)
    assert end[-1].item() == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("keywords", [{"rtol": 1e-5}, {"rtol": 1e-5, "adaptor": "pid"}, {"atol": 1e-5}])
def test_error_control_is_refused_with_methods_that_have_it(keywords: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^method = 'radau5': has no error estimate .* or use (\w+)"
    ) as caught:
        odeint(driven, torch.ones(1, 2), [0.0, 1.0], method="radau5", **keywords)
    instead = str(caught.value).partition("or use ")[2].replace(" or ", ", ").split(", ")
    assert all(METHODS[name].estimates_error and METHODS[name].implicit for name in instead)


def test_an_integral_is_refused_with_the_way_to_have_it() -> None:
    with pytest.raises(ConfigurationError, match=r"^integrate: method = 'gauss4': must be .* observe = r with save"):
        odeint(driven, torch.ones(1, 2), [0.0, 1.0], method="gauss4", integrate=lambda t, u: u.sum())


@BOTH
def test_equations_that_are_not_solved_are_an_error_with_petsc_s_reason(newton: str) -> None:
    with pytest.raises(
        ConvergenceError, match=r"^step 0 at t = 0, 0\.5 long: .*DIVERGED_MAX_IT after 1 iter"
    ) as caught:
        odeint(driven, torch.ones(1, 2), [0.0, 1.0], method="radau3", step_size=0.5, options={"snes_max_it": 1})
    assert "\n" not in str(caught.value)
    with pytest.raises(ConvergenceError, match="DIVERGED_FUNCTION_NANORINF"):
        odeint(lambda t, u: u / 0, torch.ones(1, 2), [0.0, 1.0], method="radau3", step_size=0.5, newton=newton)


def test_petsc_s_monitors_see_every_step(capfd: pytest.CaptureFixture[str]) -> None:
    odeint(driven, torch.ones(1, 2), [0.0, 1.0], method="gauss4", step_size=0.5, options={"ts_monitor": None})
    lines = [line.split()[0] for line in capfd.readouterr().out.splitlines() if " TS dt " in line]
    assert lines == ["0", "1", "2"]
