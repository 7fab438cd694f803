"""The controllers of the step size that are ours, and the bounds of the steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.integrate
import torch

from pnode_dist import ConfigurationError, NeuralODE, odeint
from pnode_dist.errors import StepSizeError
from pnode_dist.ode import adaptive_pass
from pnode_dist.ode.steppers.error_estimate import corrected
from pnode_dist.ode.time_grid import TimeGrid
from tests.oracles.right_hand_sides import Network, distance, gradients, identical, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain
from tests.oracles.step_control import controlled_steps

D = torch.float64


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[TimeGrid]:
    """The steps that solves with error control have accepted."""
    seen: list[TimeGrid] = []

    def remembering(*arguments: Any) -> TimeGrid:
        seen.append(TimeGrid(*arguments))
        return seen[-1]

    monkeypatch.setattr(adaptive_pass, "TimeGrid", remembering)
    return seen


def van_der_pol(t: Any, u: torch.Tensor) -> torch.Tensor:
    return torch.stack([u[1], 5 * (1 - u[0] ** 2) * u[1] - u[0]])


START = torch.tensor([2.0, 0.0], dtype=D)


@pytest.mark.parametrize("coefficients", [(0.0, 1.0, 0.0), (0.4, 0.3, 0.0), (0.3, 0.4, 0.1), (0.1, 0.3, 0.05)])
def test_steps_of_a_pid_controller_are_those_of_diffrax_s_formulas(
    coefficients: tuple[float, float, float], grids: list[TimeGrid]
) -> None:
    p, i, d = coefficients
    node = NeuralODE(
        van_der_pol, method="dopri5", rtol=1e-6, atol=1e-8, first_step=0.2, adaptor="pid", pcoeff=p, icoeff=i, dcoeff=d
    )
    with torch.no_grad():
        node(START, [0.0, 8.0])
    wanted, rejected = controlled_steps(van_der_pol, START, 0.2, 8.0, 1e-6, 1e-8, p, i, d)
    (grid,) = grids
    # The last steps are fitted to the output time.
    assert grid.sizes[:-2] == pytest.approx(wanted[: len(grid.sizes) - 2], rel=1e-6)
    assert len(wanted) > 50
    assert rejected > 5
    assert abs(node.last_solve.rejected_steps - rejected) <= 1


@pytest.mark.parametrize("method", ["dop853", "tsit5"])
def test_the_gradient_with_a_pid_controller_is_that_of_the_accepted_steps(method: str, grids: list[TimeGrid]) -> None:
    network, u0, name = Network(), random(2, 3), {"dop853": "853", "tsit5": "5ts"}[method]
    settings: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-8, "adaptor": "pid", "pcoeff": 0.4, "icoeff": 0.3}
    found = gradients(lambda u: odeint(network, u, [0.0, 2.5], method=method, **settings), u0, [*network.parameters()])
    (grid,) = grids

    def plain(u: torch.Tensor) -> torch.Tensor:
        states = [u]
        for start, size in zip(grid.starts, grid.sizes, strict=True):
            u = odeint_plain(network, u, [start, start + size], TABLEAUX[name])[-1]
        return torch.stack([*states, u])

    assert len(grid.sizes) > 3
    assert distance(found, gradients(plain, u0, [*network.parameters()])) <= 1e-12


@pytest.mark.parametrize("first", [0.01, 0.02, 0.05])
def test_dop853_combines_both_estimates_as_hairer_s_program_does(first: float, grids: list[TimeGrid]) -> None:
    node = NeuralODE(van_der_pol, method="dop853", rtol=1e-6, atol=1e-9, first_step=first)
    with torch.no_grad():
        node(START, [0.0, 20.0])
    peer = scipy.integrate.DOP853(
        lambda t, u: van_der_pol(t, torch.from_numpy(u)).numpy(), 0.0, START.numpy(), 20.0, rtol=1e-6, atol=1e-9,
        first_step=first,
    )  # fmt: skip
    peer.step()
    sizes = grids[0].sizes
    assert 1.01 * first < peer.h_abs < 9.9 * first
    assert sizes[:2] == pytest.approx([first, peer.h_abs], rel=1e-6)


def test_without_a_first_estimate_the_error_of_dop853_is_zero() -> None:
    assert corrected(0.0, 3.0) == 0.0
    assert corrected(2.0, 0.0) == 2.0
    assert corrected(0.3, 4.0) == pytest.approx(0.09 / math.sqrt(0.09 + 0.16))


def test_dop853_has_integral_control_unless_another_is_asked_for(grids: list[TimeGrid]) -> None:
    for settings in ({}, {"adaptor": "pid"}, {"adaptor": "pid", "pcoeff": 0.4, "icoeff": 0.3}):
        odeint(van_der_pol, START, [0.0, 5.0], method="dop853", rtol=1e-6, atol=1e-9, **settings)
    basic, integral, other = grids
    assert basic == integral != other


@pytest.mark.parametrize("settings", [{}, {"adaptor": "pid"}, {"method": "dirk_es324sal", "newton": "petsc"}])
def test_steps_stay_within_their_bounds(settings: dict[str, Any], grids: list[TimeGrid]) -> None:
    settings = {"rtol": 1e-4, "atol": 1e-6, **settings}
    network, u0 = Network(), random(2, 3)
    with torch.no_grad():
        odeint(network, u0, [0.0, 2.5], **settings)
        odeint(network, u0, [0.0, 2.5], dt_max=0.05, **settings)
        odeint(network, u0, [0.0, 2.5], first_step=0.01, dt_max=0.05, **settings)
        odeint(network, u0, [0.0, 2.5], step_size=0.01, dt_max=0.05, **settings)
    free, bounded, first, same = grids
    assert max(free.sizes) > 0.05
    # The last step takes up the rounding of the times.
    assert max(bounded.sizes) <= 0.05 * (1 + 1e-10)
    assert first.sizes[0] == 0.01
    assert first == same


@pytest.mark.parametrize("settings", [{}, {"adaptor": "pid"}, {"method": "dop853"}])
def test_the_least_size_is_reported_with_time_step_and_the_largest_component(settings: dict[str, Any]) -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.where(t < 0.5, -u, torch.tensor([[1.0, 1.0], [1.0, 1e9]], dtype=D) * u)

    with pytest.raises(StepSizeError) as caught:
        odeint(func, torch.ones(2, 2, dtype=D), [0.0, 1.0], rtol=1e-6, atol=1e-9, dt_min=1e-4, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("step ")
    assert " its size fell to 0.0001 and dt_min = 0.0001 allows no smaller one: " in message
    assert "entry [1, 1] is " in message


def test_an_implicit_solve_reports_why_its_attempts_were_rejected() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -u + 1e3 * torch.sin(1e5 * t)

    settings: dict[str, Any] = {"method": "kvaerno4", "rtol": 1e-9, "atol": 1e-12, "newton": "petsc"}
    with torch.no_grad(), pytest.raises(StepSizeError, match=r"dt_min = 0\.01 .*: the error is larger than the tol"):
        odeint(func, torch.ones(2, 2, dtype=D), [0.0, 1.0], dt_min=0.01, **settings)


@pytest.mark.parametrize("settings", [{}, {"adaptor": "pid"}, {"method": "kvaerno5", "newton": "petsc"}])
def test_more_steps_than_allowed_are_an_error(settings: dict[str, Any]) -> None:
    node = NeuralODE(Network(), rtol=1e-8, atol=1e-8, **settings)
    u0 = random(2, 3)
    with torch.no_grad():
        wanted = node(u0, [0.0, 2.5])
        taken = node.last_solve.forward_steps + node.last_solve.rejected_steps
        node.max_steps = taken
        assert identical(node(u0, [0.0, 2.5]), wanted)
        node.max_steps = taken - 1
        with pytest.raises(StepSizeError, match=rf"max_steps = {taken - 1}: more steps are needed at t = [0-9.]+,"):
            node(u0, [0.0, 2.5])


def test_steps_of_fixed_size_are_counted_before_the_first_one() -> None:
    assert odeint(Network(), random(2, 3), [0.0, 1.0], step_size=0.1, max_steps=10).shape == (2, 2, 3)
    with pytest.raises(StepSizeError, match=r"^max_steps = 9: t and step_size make 10 steps$"):
        odeint(Network(), random(2, 3), [0.0, 1.0], step_size=0.1, max_steps=9)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"dt_min": 0.1}, "dt_min = 0.1: needs rtol or atol; step_size is fixed"),
        ({"first_step": 0.1, "step_size": 0.2}, "first_step = 0.1: needs rtol or atol"),
        ({"pcoeff": 0.4}, "pcoeff = 0.4: needs rtol or atol"),
        ({"rtol": 1e-3, "pcoeff": 0.4}, "pcoeff = 0.4: adaptor = 'basic' has no such coefficient: must be 'pid'"),
        ({"rtol": 1e-3, "dcoeff": 0.0, "adaptor": "dsp"}, "dcoeff = 0.0: adaptor = 'dsp' has no such coefficient"),
        ({"rtol": 1e-3, "adaptor": "pid", "icoeff": math.nan}, "icoeff = nan: must be a finite number"),
        ({"rtol": 1e-3, "adaptor": "pid", "icoeff": "1"}, "icoeff = '1': must be a finite number"),
        (
            {"rtol": 1e-3, "adaptor": "pid", "icoeff": 0},
            "pcoeff = 0.0, icoeff = 0, dcoeff = 0.0: their sum must be",
        ),
        ({"rtol": 1e-3, "adaptor": "pid", "method": "cn"}, "adaptor = 'pid': PETSc chooses the steps of method = 'cn'"),
        ({"rtol": 1e-3, "adaptor": "dsp", "method": "dop853"}, "adaptor = 'dsp': method = 'dop853' has two error est"),
        (
            {"rtol": 1e-3, "adaptor": "pid", "method": "ssp33"},
            "method = 'ssp33': has no error estimate for a",
        ),
        (
            {"rtol": 1e-3, "adaptor": "pid", "options": {"ts_adapt_clip": "0.1,2"}},
            "options: 'ts_adapt_clip': is for",
        ),
        ({"rtol": 1e-3, "dt_min": -0.1}, "dt_min = -0.1: must be a positive number"),
        ({"rtol": 1e-3, "dt_max": math.inf}, "dt_max = inf: must be a positive number"),
        ({"rtol": 1e-3, "dt_max": True}, "dt_max = True: must be a positive number"),
        ({"rtol": 1e-3, "dt_min": 0.2, "dt_max": 0.1}, "dt_min = 0.2: must be at most dt_max = 0.1"),
        ({"rtol": 1e-3, "first_step": 0.2, "dt_max": 0.1}, "first_step = 0.2: must be within dt_min and dt_max"),
        ({"rtol": 1e-3, "step_size": 0.2, "dt_min": 0.3}, "step_size = 0.2: must be within dt_min and dt_max"),
        ({"rtol": 1e-3, "step_size": 0.2, "first_step": 0.2}, "step_size = 0.2: is another name of first_step = 0.2"),
        ({"max_steps": 0}, "max_steps = 0: must be an integer, at least 1"),
        ({"rtol": 1e-3, "max_steps": 2.5}, "max_steps = 2.5: must be an integer, at least 1"),
    ],
)
def test_settings_that_exclude_each_other_or_have_no_effect_are_refused(
    settings: dict[str, Any], complaint: str
) -> None:
    with torch.no_grad(), pytest.raises(ConfigurationError) as caught:
        odeint(Network(), random(2, 3), [0.0, 1.0], **settings)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


def test_forward_mode_repeats_the_steps_of_a_pid_controller() -> None:
    network, u0, tangent = Network(), random(2, 3), random(2, 3, seed=5)
    settings: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7, "adaptor": "pid", "dt_max": 0.3, "max_steps": 1000}

    def solve(u: torch.Tensor) -> torch.Tensor:
        end: torch.Tensor = odeint(network, u, [0.0, 1.0], **settings)[-1]
        return end

    _, forward = torch.func.jvp(solve, (u0,), (tangent,))
    start = u0.clone().requires_grad_()
    weights = random(2, 3, seed=9)
    (backward,) = torch.autograd.grad((solve(start) * weights).sum(), start)
    assert float((forward * weights).sum().detach()) == pytest.approx(float((backward * tangent).sum()), rel=1e-12)
