"""A steady state and its gradient are those of dense Newton steps and of the implicit function theorem."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, ConvergenceError, steady_state
from pnode_dist.ode.steppers.preconditioner import BlockInverse, UserPC
from pnode_dist.steady import SteadySettings, find
from tests.oracles.right_hand_sides import distance
from tests.unit.steady.plain_newton import dense_jacobian, implicit_gradient, plain_newton

D = torch.float64
N = 6
TIGHT: dict[str, Any] = {"rtol": 1e-14, "options": {"ksp_rtol": 1e-13}}


class Relaxation(nn.Module):
    """du/dt = A u - u^3 + b, with a stable A."""

    def __init__(self, dtype: torch.dtype = D) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.matrix = nn.Parameter((0.5 * torch.randn(N, N, dtype=D) - 2 * torch.eye(N, dtype=D)).to(dtype))
        self.bias = nn.Parameter(torch.randn(N, dtype=D).to(dtype))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u @ self.matrix.T - u**3 + self.bias


def frozen(func: Relaxation) -> Any:
    return lambda u: func(torch.zeros((), dtype=D), u)


def cotangent() -> torch.Tensor:
    return torch.linspace(-1.0, 2.0, N, dtype=D)


@pytest.mark.parametrize("preconditioner", [None, "block"])
@pytest.mark.parametrize("solver", ["newtonls", "newtontr", "pseudo"])
def test_state_and_gradient_are_those_of_dense_newton_steps(solver: str, preconditioner: str | None) -> None:
    func, u0 = Relaxation(), torch.zeros(N, dtype=D)
    found = steady_state(func, u0, solver=solver, preconditioner=preconditioner, **TIGHT)
    wanted = plain_newton(frozen(func), u0)
    assert distance(found, wanted) <= 1e-12
    gradient = torch.autograd.grad(found, list(func.parameters()), cotangent())
    expected = implicit_gradient(frozen(func), wanted, cotangent(), list(func.parameters()))
    assert max(map(distance, gradient, expected)) <= 1e-12


def test_a_tuple_with_a_batch_and_args_is_solved_and_differentiated() -> None:
    torch.manual_seed(1)
    rate = torch.tensor(0.7, dtype=D, requires_grad=True)
    force = torch.randn(3, 2, dtype=D, requires_grad=True)

    def func(t: torch.Tensor, u: tuple[torch.Tensor, ...], force: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = u
        return -a + rate * torch.tanh(b.sum(-1)) + t, force - 2 * b - b**3 + 0.1 * a[:, None]

    def flat(u: torch.Tensor) -> torch.Tensor:
        a, b = func(torch.tensor(0.5, dtype=D), (u[:3], u[3:].view(3, 2)), force)
        return torch.cat([a, b.reshape(-1)])

    u0 = torch.zeros(3, dtype=D), torch.zeros(3, 2, dtype=D)
    a, b = steady_state(func, u0, args=(force,), t=0.5, **TIGHT)
    wanted = plain_newton(flat, torch.zeros(9, dtype=D))
    assert distance(torch.cat([a, b.reshape(-1)]), wanted) <= 1e-12
    along = torch.linspace(-1.0, 1.0, 9, dtype=D)
    gradient = torch.autograd.grad((a, b), (rate, force), (along[:3], along[3:].view(3, 2)))
    assert max(map(distance, gradient, implicit_gradient(flat, wanted, along, (rate, force)))) <= 1e-12


def test_the_gradient_takes_one_linear_solve_and_no_evaluation_of_func() -> None:
    class Counted(Relaxation):
        calls = 0

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(t, u)

    func = Counted()
    found = find(func, torch.zeros(N, dtype=D), SteadySettings(**TIGHT))
    before = func.calls
    assert before == found.evaluations
    found.u.square().sum().backward(retain_graph=True)
    first = func.bias.grad
    assert func.calls == before
    assert first is not None
    once = first.clone()
    found.u.square().sum().backward()
    assert func.bias.grad is not None
    assert distance(func.bias.grad, 2 * once) == 0


def test_the_counts_and_the_residual_of_a_solve_are_returned() -> None:
    func = Relaxation()
    found = find(func, torch.zeros(N, dtype=D), SteadySettings(rtol=1e-10, preconditioner=BlockInverse()))
    assert found.reason == "CONVERGED_FNORM_RELATIVE"
    assert 2 <= found.iterations == found.linear_iterations <= 10
    residual = float(frozen(func)(found.u).detach().norm())
    assert residual <= 1e-10 * float(func.bias.detach().norm())
    assert abs(found.residual - residual) <= 1e-15


@pytest.mark.parametrize("solver", ["newtonls", "newtontr", "pseudo"])
def test_a_solve_ends_at_the_absolute_tolerance(solver: str) -> None:
    func, start = Relaxation(), torch.zeros(N, dtype=D)
    found = find(func, start, SteadySettings(solver=solver, rtol=1e-14, atol=1e-2))
    exact = find(func, start, SteadySettings(solver=solver, rtol=1e-14))
    assert 1e-14 < found.residual < 1e-2
    assert found.iterations < exact.iterations
    assert found.reason in ("CONVERGED_FNORM_ABS", "CONVERGED_PSEUDO_FATOL")


def test_the_gradient_with_respect_to_u0_is_zero() -> None:
    func = Relaxation()
    u0 = torch.zeros(N, dtype=D, requires_grad=True)
    shift = torch.zeros(N, dtype=D, requires_grad=True)
    (steady_state(func, u0, **TIGHT) + shift + 0 * u0).sum().backward()
    assert u0.grad is not None
    assert not u0.grad.any()
    fixed = Relaxation().requires_grad_(False)
    steady_state(fixed, u0, **TIGHT).sum().backward()
    assert not u0.grad.any()


def test_float32_states_and_compute_dtype_keep_the_types_of_the_caller() -> None:
    func = Relaxation(torch.float32)
    found = steady_state(func, torch.zeros(N))
    assert found.dtype == torch.float32
    wanted = plain_newton(frozen(Relaxation()), torch.zeros(N, dtype=D))
    assert distance(found.double(), wanted) <= 1e-4
    found.sum().backward()
    assert func.bias.grad is not None
    assert func.bias.grad.dtype == torch.float32
    narrow = Relaxation()
    mixed = steady_state(narrow, torch.zeros(N, dtype=D), compute_dtype=torch.float32)
    assert mixed.dtype == D
    mixed.sum().backward()
    assert narrow.bias.grad is not None
    assert narrow.bias.grad.dtype == D
    expected = implicit_gradient(frozen(narrow), wanted, torch.ones(N, dtype=D), [narrow.bias])[0]
    assert distance(narrow.bias.grad, expected) <= 1e-4
    assert distance(narrow.bias.grad, expected) > 0


def test_first_derivatives_take_create_graph_and_second_ones_are_refused() -> None:
    func = Relaxation()
    found = steady_state(func, torch.zeros(N, dtype=D), **TIGHT)
    (gradient,) = torch.autograd.grad(found.sum(), func.bias, create_graph=True)
    expected = implicit_gradient(frozen(func), found, torch.ones(N, dtype=D), [func.bias])[0]
    assert distance(gradient, expected) <= 1e-12
    with pytest.raises(ConfigurationError, match="second derivatives are not available"):
        gradient.sum().backward()


def test_transforms_and_forward_mode_are_refused() -> None:
    func = Relaxation()
    with pytest.raises(ConfigurationError, match="not available under torch's transforms"):
        torch.func.grad(lambda u: steady_state(func, u).sum())(torch.zeros(N, dtype=D))


def test_a_parameter_changed_before_the_backward_pass_is_an_error() -> None:
    func = Relaxation()
    found = steady_state(func, torch.zeros(N, dtype=D))
    with torch.no_grad():
        func.bias.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_no_grad_and_inference_mode_return_plain_states() -> None:
    func = Relaxation()
    wanted = steady_state(func, torch.zeros(N, dtype=D)).detach()
    with torch.no_grad():
        assert not steady_state(func, torch.zeros(N, dtype=D)).requires_grad
    with torch.inference_mode():
        assert distance(steady_state(func, torch.zeros(N, dtype=D)), wanted) == 0


def test_results_computed_before_the_solve_pass_the_gradient_on() -> None:
    leaf = torch.linspace(0.5, 1.0, N, dtype=D).requires_grad_()
    result = leaf.exp()
    found = steady_state(lambda t, u: result - leaf * u, torch.zeros(N, dtype=D), **TIGHT)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    # u = exp(a) / a.
    assert distance(gradient, (leaf.exp() * (leaf - 1) / leaf**2).detach()) <= 1e-12


@pytest.mark.parametrize("solver", ["newtonls", "newtontr", "pseudo"])
def test_a_func_that_is_not_a_number_is_an_error(solver: str) -> None:
    for settings in ({}, {"phase": torch.ones(N, dtype=D)}, {"deflate": torch.ones(N, dtype=D)}):
        if solver != "pseudo" or "deflate" not in settings:
            with pytest.raises(ConvergenceError, match="was not found"):
                steady_state(lambda t, u: u * float("nan"), torch.zeros(N, dtype=D), solver=solver, **settings)


def test_a_parameter_that_is_not_found_is_refused() -> None:
    hidden = {"a": torch.ones(N, dtype=D, requires_grad=True)}

    class Holder:
        __slots__ = ("value",)

    holder = Holder()
    holder.value = hidden["a"]  # type: ignore[attr-defined]
    bias = torch.ones(N, dtype=D, requires_grad=True)
    with pytest.raises(ValueError, match="was not found among its parameters"):
        steady_state(lambda t, u: bias - holder.value * u, torch.zeros(N, dtype=D))  # type: ignore[attr-defined]
    named = steady_state(
        lambda t, u: bias - holder.value * u,  # type: ignore[attr-defined]
        torch.zeros(N, dtype=D),
        params=(hidden["a"],),
        **TIGHT,
    )
    named.sum().backward()
    grad = hidden["a"].grad
    assert grad is not None
    assert distance(grad, -torch.ones(N, dtype=D)) <= 1e-12


def test_errors_of_func_are_raised_as_themselves_and_spoil_no_later_solve() -> None:
    fails = [2]

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        fails[0] -= 1
        if fails[0] == 0:
            raise KeyError("no such species")
        return 1 - u

    for solver in ("newtonls", "newtontr", "pseudo"):
        fails[0] = 2
        with pytest.raises(KeyError, match="no such species"):
            steady_state(func, torch.zeros(N, dtype=D), solver=solver)
    assert distance(steady_state(func, torch.zeros(N, dtype=D)), torch.ones(N, dtype=D)) <= 1e-12
    with pytest.raises(ValueError, match="must have the shape of u"):
        steady_state(lambda t, u: u[:1], torch.zeros(N, dtype=D))


@pytest.mark.parametrize("preconditioner", [None, "block"])
@pytest.mark.parametrize("solver", ["newtonls", "newtontr", "pseudo"])
def test_equations_without_a_solution_are_an_error_with_petsc_s_reason(solver: str, preconditioner: str | None) -> None:
    wanted = rf"was not found: {solver} ended with (DI|CON)VERGED_.*\|f\| ="
    # The Jacobian of the second is singular, also for the preconditioner.
    for func in (lambda t, u: u**2 + 1, lambda t, u: 0 * u + 1):
        with pytest.raises(ConvergenceError, match=wanted) as error:
            steady_state(func, torch.ones(N, dtype=D), solver=solver, max_it=20, preconditioner=preconditioner)
        assert "\n" not in str(error.value)


def test_a_transposed_solve_that_fails_is_an_error() -> None:
    class Forward:
        """The exact inverse, whose transpose is zero."""

        def __init__(self, func: Relaxation) -> None:
            self.func = func

        def update(self, t: float, u: torch.Tensor, shift: float) -> None:
            self.inverse = torch.linalg.inv(shift * torch.eye(N, dtype=D) - dense_jacobian(frozen(self.func), u))

        def apply(self, pc: Any, x: Any, y: Any) -> None:
            y.setArray((self.inverse @ torch.from_numpy(x.getArray(True).copy())).numpy())

        def applyTranspose(self, pc: Any, x: Any, y: Any) -> None:
            y.setArray(0 * x.getArray(True))

    func = Relaxation()
    options = {"ksp_max_it": 1, "ksp_pc_side": "right"}
    found = steady_state(func, torch.zeros(N, dtype=D), preconditioner=UserPC(Forward(func)), options=options)
    assert distance(found, plain_newton(frozen(func), torch.zeros(N, dtype=D))) <= 1e-8
    with pytest.raises(ConvergenceError, match="the transposed linear system was not solved to rtol = 1e-09: DIVERGED"):
        found.sum().backward()


def test_pseudo_time_reaches_a_state_where_newton_s_method_runs_away() -> None:
    # Beyond |u - 0.3| = 1 the slope has the other sign, so Newton steps lead to infinity; du/dt = f leads back.
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -(u - 0.3) / (1 + (u - 0.3) ** 2)

    start = torch.full((1,), 2.0, dtype=D)
    for solver in ("newtonls", "newtontr"):
        with pytest.raises(ConvergenceError, match="ended with DIVERGED"):
            steady_state(func, start, solver=solver, max_it=20)
    found = find(func, start, SteadySettings(solver="pseudo", rtol=1e-13, step_size=0.5))
    assert found.reason == "CONVERGED_PSEUDO_FATOL"
    assert abs(found.u.item() - 0.3) <= 1e-12
