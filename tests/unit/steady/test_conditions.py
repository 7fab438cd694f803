"""Deflation finds further steady states, and phase conditions single out one of a family."""

from __future__ import annotations

import math

import pytest
import torch
from mpi4py import MPI

from pnode_dist import ConvergenceError, steady_state
from pnode_dist.ode.steppers.preconditioner import UserPC
from pnode_dist.steady import SteadySettings, find
from pnode_dist.steady.conditions import deflation_of
from pnode_dist.steady.low_rank import LowRank
from tests.oracles.right_hand_sides import distance

D = torch.float64


def bistable(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Nine steady states: each component is -1, 0 or 1."""
    return u - u**3


@pytest.mark.parametrize(("solver", "count"), [("newtonls", 9), ("newtontr", 2)])
@pytest.mark.parametrize("preconditioner", [None, "block"])
def test_deflation_finds_further_roots_from_the_same_start(solver: str, count: int, preconditioner: str | None) -> None:
    start, known = torch.tensor([0.6, 0.4], dtype=D), []
    for _ in range(count):
        found = steady_state(
            bistable, start, solver=solver, deflate=tuple(known), preconditioner=preconditioner, rtol=1e-12, max_it=200
        )
        assert float(bistable(found, found).norm()) <= 1e-11
        known.append(found)
    roots = torch.stack(known).round()
    assert len({tuple(root.tolist()) for root in roots}) == count
    assert distance(torch.stack(known), roots) <= 1e-11


def test_without_deflation_the_same_root_is_found_again() -> None:
    start = torch.tensor([0.6, 0.4], dtype=D)
    once, again = (steady_state(bistable, start) for _ in range(2))
    assert distance(once, again) == 0


def test_deflated_newton_steps_are_scaled_by_the_sherman_morrison_scalar() -> None:
    # With a direct solve a step is tau J^-1 f, tau = 1 / (1 - m . J^-1 f / M): the formula of Farrell et al.
    start, root, rtol = torch.tensor([0.97, 0.9], dtype=D), torch.tensor([1.0, 1.0], dtype=D), 0.3
    u, steps, factor = start, 0, 1.0
    target = rtol * float(bistable(u, u).norm())
    while float(bistable(u, u).norm()) > target:
        square = (u - root).square().mean()
        factor = float(1 / square + 1)
        slope = -2 * (u - root) / 2 / square**2
        newton = -bistable(u, u) / (1 - 3 * u**2)
        u, steps = u + newton / (1 - slope @ newton / factor), steps + 1
    settings = SteadySettings(deflate=root, preconditioner="block", rtol=rtol, options={"ksp_type": "preonly"})
    found = find(bistable, start, settings)
    assert steps >= 3
    assert (found.reason, found.iterations) == ("CONVERGED_FNORM_RELATIVE", steps)
    assert distance(found.u, u) <= 1e-12
    assert abs(found.residual - float(bistable(u, u).norm())) <= 1e-12


def test_the_gradient_of_a_deflated_root_is_that_of_the_root() -> None:
    force = torch.tensor(0.1, dtype=D, requires_grad=True)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u - u**3 + force

    first = steady_state(func, torch.full((1,), 0.8, dtype=D), rtol=1e-13)
    second = steady_state(func, torch.full((1,), 0.8, dtype=D), deflate=first, rtol=1e-13)
    assert (second - first).abs().item() > 0.5
    (gradient,) = torch.autograd.grad(second.sum(), force)
    assert abs(gradient.item() - 1 / (3 * second.item() ** 2 - 1)) <= 1e-12


def test_the_gradient_of_the_deflation_factor_is_that_of_autograd() -> None:
    torch.manual_seed(2)
    known, u = torch.randn(3, 4, dtype=D), torch.randn(4, dtype=D, requires_grad=True)
    deflation = deflation_of(MPI.COMM_SELF, known, u.detach())
    assert deflation is not None
    factor, slope = deflation.factor_and_gradient(u.detach())
    plain = math.prod(1 / (u - root).square().mean() + 1 for root in known)
    assert isinstance(plain, torch.Tensor)
    assert abs(factor - plain.item()) <= 1e-14 * factor
    assert abs(deflation.factor(u.detach()) - factor) <= 1e-14 * factor
    assert distance(slope, torch.autograd.grad(plain, u)[0]) <= 1e-14


@pytest.mark.parametrize("transposed", [False, True])
def test_the_inverse_with_a_change_of_low_rank_is_the_dense_one(transposed: bool) -> None:
    torch.manual_seed(2)
    base = torch.randn(5, 5, dtype=D) + 5 * torch.eye(5, dtype=D)
    left, right = torch.randn(2, 5, dtype=D), torch.randn(2, 5, dtype=D)
    whole = 1.7 * base + left.T @ right
    inverse = torch.linalg.inv(base.T if transposed else base)
    product = LowRank(MPI.COMM_SELF, 1.7, left, right).inverse(lambda flat: inverse @ flat, transposed)
    flat = torch.randn(5, dtype=D)
    assert distance(product(flat), torch.linalg.solve(whole.T if transposed else whole, flat)) <= 1e-14


class Circle:
    """du/dt = (a - |u|^2) u + omega R u: a circle of radius sqrt(a) of steady states, where omega = 0."""

    def __init__(self, omega: float) -> None:
        self.size = torch.tensor(2.0, dtype=D, requires_grad=True)
        self.turn = omega * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=D)

    def __call__(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return (self.size - u @ u) * u + self.turn @ u


@pytest.mark.parametrize("solver", ["newtonls", "newtontr", "pseudo"])
@pytest.mark.parametrize("preconditioner", [None, "block"])
def test_a_phase_condition_selects_one_state_of_a_circle(solver: str, preconditioner: str | None) -> None:
    func = Circle(0.0)
    angle = 0.7
    start = 0.9 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=D)
    tangent = torch.tensor([-start[1], start[0]], dtype=D) + 0.1 * start
    found = steady_state(func, start, solver=solver, phase=tangent, preconditioner=preconditioner, rtol=1e-13)
    # The intersection of the circle with the line through u0 that is orthogonal to the vector.
    assert abs(float(found.detach() @ found.detach()) - 2.0) <= 1e-12
    assert abs(float(tangent @ (found.detach() - start))) <= 1e-12
    # It moves along this line when the circle grows: <u, du> = da / 2.
    line = torch.tensor([-tangent[1], tangent[0]], dtype=D)
    expected = line / (2 * line @ found.detach())
    for component in range(2):
        (gradient,) = torch.autograd.grad(found[component], func.size, retain_graph=True)
        assert abs(gradient.item() - expected[component].item()) <= 1e-12


@pytest.mark.parametrize("preconditioner", [None, "block"])
def test_the_gradient_of_a_symmetric_func_without_a_phase_is_refused(preconditioner: str | None) -> None:
    found = steady_state(Circle(0.0), torch.tensor([1.2, 0.1], dtype=D), preconditioner=preconditioner)
    with pytest.raises(ConvergenceError, match=r"transposed linear system.* or give phase= if f has a symmetry"):
        found[1].backward()


@pytest.mark.parametrize("omega", [0.3, 1e-5])
def test_a_state_that_moves_along_its_symmetry_is_refused(omega: float) -> None:
    start = torch.tensor([1.2, 0.1], dtype=D)
    tangent = torch.tensor([-start[1], start[0]], dtype=D)
    with pytest.raises(ConvergenceError, match="phase: the state that was found is not steady") as error:
        steady_state(Circle(omega), start, phase=tangent)
    assert "\n" not in str(error.value)


def test_a_context_of_the_user_s_is_changed_by_the_conditions_as_well() -> None:
    class Diagonal:
        def update(self, t: float, u: torch.Tensor, shift: float) -> None:
            self.values = shift + 3 * u**2 - 1

        def apply(self, pc: object, x: object, y: object) -> None:
            y.setArray(x.getArray(True) / self.values.numpy())  # type: ignore[attr-defined]

        def applyTranspose(self, pc: object, x: object, y: object) -> None:
            self.apply(pc, x, y)

    start = torch.tensor([0.6, 0.4], dtype=D)
    root = steady_state(bistable, start)
    settings = SteadySettings(
        deflate=root, preconditioner=UserPC(Diagonal()), options={"ksp_type": "preonly"}, max_it=200
    )
    found = find(bistable, start, settings)
    assert distance(found.u, found.u.round()) <= 1e-8
    assert distance(found.u.round(), root.round()) >= 1
    assert found.linear_iterations == found.iterations
