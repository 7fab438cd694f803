"""Dense solutions at any time, against plain torch: the steps, one shorter step, and their derivatives."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, Trajectory, odeint, solve_dense
from tests.oracles.implicit import CRANK_NICOLSON, odeint_implicit
from tests.oracles.right_hand_sides import Network, distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

QUERIES = [0.73, 0.2, 0.31, 1.3, 0.9, 0.74, 0.31]
SPAN = [0.2, 1.3]
TIGHT = {"snes_rtol": 1e-13, "snes_stol": 1e-15, "ksp_rtol": 1e-13}


def interpolated(solve: Any, f: Any, u0: torch.Tensor, ends: list[float], times: list[float]) -> torch.Tensor:
    """The states at `times`: by steps to the ends before, and one shorter step, of a plain solver."""
    found = []
    for time in times:
        passed = [end for end in ends if end < time] or ends[:1]
        found.append(solve(f, u0, [*passed, time] if time > passed[-1] else passed)[-1])
    return torch.stack(found)


@pytest.mark.parametrize("keep", ["solution", "stages", "graph"])
@pytest.mark.parametrize(("method", "table"), [("rk4", "4"), ("dopri5", "5dp")])
def test_it_is_one_shorter_step_of_the_explicit_method(method: str, table: str, keep: str) -> None:
    f, u0 = Network(), random(2, 3).requires_grad_()
    solution = solve_dense(f, u0, SPAN, method=method, step_size=0.25, trajectory=Trajectory(ram="1MiB", keep=keep))
    found = solution(QUERIES)
    assert (solution.t0, solution.t1, solution.steps) == (0.2, 1.3, 5)

    def plain(g: Any, u: torch.Tensor, t: list[float]) -> torch.Tensor:
        return odeint_plain(g, u, t, TABLEAUX[table])

    wanted = interpolated(plain, f, u0, solution.times.tolist(), QUERIES)
    assert distance(found, wanted) < 1e-12
    inputs = [u0, *f.parameters()]
    own, expected = (torch.autograd.grad(states.sin().sum(), inputs) for states in (found, wanted))
    assert distance(own, expected) < 1e-12


def test_it_is_one_shorter_step_of_an_implicit_method() -> None:
    f, u0 = Network(), random(2, 3).requires_grad_()
    solution = solve_dense(f, u0, SPAN, method="cn", step_size=0.25, newton="petsc", options=TIGHT)

    def plain(g: Any, u: torch.Tensor, t: list[float]) -> torch.Tensor:
        return odeint_implicit(g, u, t, CRANK_NICOLSON)

    found, wanted = solution(QUERIES), interpolated(plain, f, u0, solution.times.tolist(), QUERIES)
    assert distance(found, wanted) < 1e-10
    inputs = [u0, *f.parameters()]
    own, expected = (torch.autograd.grad(states.sin().sum(), inputs) for states in (found, wanted))
    assert distance(own, expected) < 1e-10


def test_with_error_control_the_steps_are_those_of_the_solve() -> None:
    f, u0 = Network(), random(2, 3)
    solution = solve_dense(f, u0, SPAN, rtol=1e-6, atol=1e-8)
    assert torch.equal(solution(1.3), odeint(f, u0, SPAN, rtol=1e-6, atol=1e-8)[-1])
    fine = odeint_plain(f, u0, [0.2, 0.73], TABLEAUX["8dp"], 0.01)[-1]
    assert distance(solution(0.73), fine) < 1e-5


@pytest.mark.parametrize(("method", "order"), [("rk4", 4), ("dopri5", 5), ("bosh3", 3)])
def test_inside_a_step_the_error_has_the_order_of_the_method(method: str, order: int) -> None:
    def f(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.cos(t) * u

    times = torch.linspace(0.0, 2.0, 31, dtype=torch.float64)
    exact = torch.exp(torch.sin(times)).unsqueeze(-1)
    errors = [
        float(
            (solve_dense(f, torch.ones(1, dtype=torch.float64), [0.0, 2.0], method=method, step_size=h)(times) - exact)
            .abs()
            .max()
        )
        for h in (0.1, 0.05)
    ]
    assert math.log2(errors[0] / errors[1]) > order - 0.4


def test_hermites_cubic_has_order_three_and_the_states_and_slopes_of_both_ends() -> None:
    f, u0 = Network(), random(2, 3)
    solution = solve_dense(f, u0, SPAN, step_size=0.25, interpolant="hermite")
    assert distance(solution(solution.times.detach()), solution.states) < 1e-14
    for number in (0, 2):
        time = solution.times[number + 1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(solution(time)[0, 1], time)
        expected = f(time, solution.states[number + 1])[0, 1]  # type: ignore[index]
        assert slope.item() == pytest.approx(expected.item(), rel=1e-12)
    fine = solve_dense(f, u0, SPAN, step_size=0.01)
    errors = [
        float((solve_dense(f, u0, SPAN, step_size=h, interpolant="hermite")(QUERIES) - fine(QUERIES)).abs().max())
        for h in (0.2, 0.1)
    ]
    assert math.log2(errors[0] / errors[1]) > 2.6


class Clocked(Network):
    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return super().forward(t, u) * torch.cos(3 * t) + t * u


def classical_step(f: nn.Module, u: torch.Tensor, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    h = end - begin
    a = f(begin, u)
    b = f(begin + h / 2, u + h / 2 * a)
    c = f(begin + h / 2, u + h / 2 * b)
    return u + h / 6 * (a + 2 * b + 2 * c + f(end, u + h * c))


@pytest.mark.parametrize("backward", [False, True], ids=["increasing", "decreasing"])
def test_the_gradient_with_respect_to_times_and_span_is_that_of_plain_torch(backward: bool) -> None:
    f, u0 = Clocked(), random(2, 3)
    span = torch.tensor(SPAN[::-1] if backward else SPAN, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.8, 0.2, 0.35, 1.3], dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(solve_dense(f, u0, span, step_size=0.275)(times).square().sum(), [span, times])
    ends = [span[0] + share * (span[1] - span[0]) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    states = [u0]
    for begin, end in pairwise(ends):
        states.append(classical_step(f, states[-1], begin, end))
    total = torch.zeros((), dtype=torch.float64)
    for time in times:
        sign = -1.0 if backward else 1.0
        number = max(sum(sign * end.item() < sign * time.item() - 1e-15 for end in ends) - 1, 0)
        total = total + classical_step(f, states[number], ends[number], time).square().sum()
    assert distance(found, torch.autograd.grad(total, [span, times])) < 1e-12


def test_jumps_bound_the_steps_of_a_dense_solution() -> None:
    def f(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.where(t < 0.5, 1.0, -2.0) * torch.ones_like(u)

    for interpolant in ("step", "hermite"):
        u0 = torch.zeros(1, dtype=torch.float64)
        solution = solve_dense(f, u0, [0.0, 1.0], step_size=0.3, jumps=[0.5], interpolant=interpolant)
        found = solution([0.1, 0.5, 0.6, 1.0])
        assert distance(found[:, 0], torch.tensor([0.1, 0.5, 0.3, -0.5], dtype=torch.float64)) < 1e-14


def test_a_tuple_of_complex_and_real_parts_is_evaluated_part_by_part() -> None:
    u0 = (torch.ones(2, dtype=torch.complex128), torch.ones(3, dtype=torch.float64))
    for interpolant, most in (("step", 1e-9), ("hermite", 1e-6)):
        solution = solve_dense(lambda t, u: (1j * u[0], -u[1]), u0, [0.0, 1.0], step_size=0.02, interpolant=interpolant)
        wave, decay = solution(np.array([0.317, 0.7]))
        at = torch.tensor([0.317, 0.7], dtype=torch.float64)
        assert distance(wave[:, 0], torch.exp(1j * at)) < most
        assert distance(decay[:, 2], torch.exp(-at)) < most


@pytest.mark.parametrize(
    "form", [float, np.float64, lambda t: torch.tensor(t, dtype=torch.float64), lambda t: np.array(t)]
)
def test_one_time_gives_one_state_and_no_time_none(form: Any) -> None:
    solution = solve_dense(Network(), random(2, 3), SPAN, step_size=0.25)
    assert solution(form(0.7)).shape == (2, 3)  # type: ignore[union-attr]
    assert solution([]).shape == (0, 2, 3)  # type: ignore[union-attr]


def test_an_array_of_xarray_gives_the_times() -> None:
    xarray = pytest.importorskip("xarray")
    solution = solve_dense(Network(), random(2, 3), SPAN, step_size=0.25)
    assert torch.equal(solution(xarray.DataArray([0.3, 0.7], dims="time")), solution([0.3, 0.7]))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"interpolant": "cubic"}, "interpolant = 'cubic': must be one of step, hermite"),
        ({"last_only": True}, "last_only = True: must be False, because a dense solution needs all states"),
        ({"observe": torch.sin}, "observe = .*: must be None, because a dense solution needs all states"),
        ({"t_span": [0.0, 0.5, 1.0]}, r"t_span = \[0.0, 0.5, 1.0\]: must be two different times"),
        ({"t_span": [1.0, 1.0]}, "must be two different times"),
        ({"t_span": ["a", "b"]}, "t_span: <U1: must be numbers"),
        ({"method": "cn", "mass": torch.ones(2, 3), "interpolant": "hermite"}, "interpolant = 'hermite'"),
    ],
)
def test_other_arguments_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        solve_dense(Network(), random(2, 3), **{"t_span": SPAN, **keywords})


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (0.1, "t = 0.10.*: must be between 0.2.* and 1.3.*, the solved span"),
        ([0.3, 1.31], "t = 1.31"),
        (float("nan"), "t: must be finite"),
        ([[0.3]], r"t: shape \(1, 1\)"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "t: datetime64"),
    ],
)
def test_times_outside_of_the_span_are_refused(t: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        solve_dense(Network(), random(2, 3), SPAN, step_size=0.25)(t)


def test_the_settings_of_error_control_do_not_reach_the_repeated_steps() -> None:
    controlled: dict[str, Any] = {"rtol": 1e-5, "dt_max": 0.2, "first_step": 0.01, "adaptor": "pid"}
    solution = solve_dense(lambda t, u: -u, torch.ones(2, dtype=torch.float64), [0.0, 1.0], **controlled)
    assert solution.steps >= 5
    assert torch.allclose(solution(0.37), torch.exp(torch.tensor(-0.37, dtype=torch.float64)), rtol=1e-5)
