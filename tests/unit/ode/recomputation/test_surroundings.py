"""A backward pass sees f as the forward pass saw it, whatever a program changes in between."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import NeuralODE, Trajectory, odeint
from tests.oracles.impure import plain_steps
from tests.oracles.right_hand_sides import distance, random

INTERVAL = [0.0, 1.0]
KEEPS = pytest.mark.parametrize("keep", ["solution", "stages", "graph"])


def budget(keep: str) -> Trajectory:
    return Trajectory(ram="1MiB", keep=keep)


class Decay(nn.Module):
    """du/dt = -c w u."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.c = 1.0

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -self.c * self.w * u


def one() -> torch.Tensor:
    return torch.ones(1, dtype=torch.float64)


@KEEPS
def test_an_attribute_may_change_between_chained_solves(keep: str) -> None:
    func = Decay()
    solve = NeuralODE(func, step_size=0.02, trajectory=budget(keep))
    u = one()
    for func.c in (1.0, 2.0, 3.0):
        u = solve(u, INTERVAL)[-1]
    u.sum().backward()
    assert func.w.grad is not None
    assert func.w.grad.item() == pytest.approx(-6 * math.exp(-6), rel=1e-6)
    assert round(func.w.grad.item(), 4) == -0.0149
    assert func.c == 3.0


@KEEPS
def test_a_loop_variable_may_change_between_chained_solves(keep: str) -> None:
    w, u = one().requires_grad_(), one()
    for c in (1.0, 2.0, 3.0):
        u = odeint(lambda t, x: -c * w * x, u, INTERVAL, step_size=0.02, trajectory=budget(keep))[-1]  # noqa: B023
    (found,) = torch.autograd.grad(u.sum(), w)
    assert found.item() == pytest.approx(-6 * math.exp(-6), rel=1e-6)


@KEEPS
def test_functional_call_differentiates_by_what_it_puts_in_place(keep: str) -> None:
    solve = NeuralODE(Decay(), step_size=0.02, trajectory=budget(keep))
    given = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    end = torch.func.functional_call(solve, {"func.w": given}, (one(), INTERVAL))[-1]
    (found,) = torch.autograd.grad(end.sum(), given)
    assert found.item() == pytest.approx(-math.exp(-2), rel=1e-6)
    assert round(found.item(), 4) == -0.1353


def layers(kind: str) -> nn.Module:
    linear = nn.Linear(4, 4, dtype=torch.float64)
    if kind == "old spectral norm":
        linear = nn.utils.spectral_norm(linear)
    if kind == "spectral norm":
        linear = nn.utils.parametrizations.spectral_norm(linear)
    between = {"dropout": nn.Dropout(0.3), "batch norm": nn.BatchNorm1d(4, dtype=torch.float64)}.get(
        kind, nn.Identity()
    )
    return nn.Sequential(linear, between, nn.Tanh())


@KEEPS
@pytest.mark.parametrize("kind", ["dropout", "old spectral norm", "spectral norm", "batch norm"])
def test_state_of_layers_is_carried_once_as_in_a_plain_loop(kind: str, keep: str) -> None:
    ours, start = layers(kind), random(5, 4)
    plain = copy.deepcopy(ours)
    torch.manual_seed(1)
    end = odeint(lambda t, u: ours(u), start, INTERVAL, step_size=0.1, trajectory=budget(keep))[-1]
    drawn = torch.get_rng_state()
    torch.manual_seed(1)
    wanted = plain_steps(lambda t, u: plain(u), start, 10, "4")
    assert torch.equal(drawn, torch.get_rng_state())
    torch.manual_seed(2)
    ours.eval()
    end.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(2).get_state())
    assert not ours.training
    wanted.square().sum().backward()
    # That of a bias ahead of a batch norm is zero but for rounding.
    found, expected = (
        torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None]) for module in (ours, plain)
    )
    assert distance(found, expected) <= 1e-12
    for buffer, other in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-13, atol=0)


@KEEPS
@pytest.mark.parametrize("where", ["forward", "backward", "both"])
def test_autocast_is_that_of_the_forward_pass(where: str, keep: str) -> None:
    func, start = nn.Linear(4, 4), random(5, 4, dtype=torch.float32)

    def gradient(solve: Callable[[], torch.Tensor], backward: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=where in ("forward", "both"), cache_enabled=False):
            end = solve()
        with torch.autocast("cpu", torch.bfloat16, enabled=backward and where in ("backward", "both")):
            return torch.autograd.grad(end.double().square().sum(), func.weight)[0]

    def right_hand_side(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return func(u).float()

    found = gradient(
        lambda: odeint(right_hand_side, start, INTERVAL, step_size=0.25, trajectory=budget(keep))[-1], True
    )
    wanted = gradient(
        lambda: odeint(right_hand_side, start, INTERVAL, step_size=0.25, trajectory=budget("graph"))[-1], False
    )
    # Stage by stage the same numbers are added in another order.
    assert distance(found, wanted) <= (torch.finfo(torch.float32).eps if keep == "stages" else 0.0)
    plain = gradient(lambda: plain_steps(lambda t, u: right_hand_side(t, u.float()), start.double(), 4, "4"), False)
    assert distance(found, plain) <= (1e-6 if where == "backward" else 2e-2)


def test_casts_made_without_a_gradient_do_not_hide_parameters() -> None:
    func, start = nn.Linear(4, 4), random(5, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            func(start)
        end = odeint(lambda t, u: func(u).float(), start, INTERVAL, step_size=0.25, trajectory=budget("solution"))[-1]
        (found,) = torch.autograd.grad(end.sum(), func.weight)
    assert found.abs().max() > 0.1


@KEEPS
def test_the_default_type_is_that_of_the_forward_pass(keep: str) -> None:
    w = one().requires_grad_()

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -w * u * torch.full((1,), 0.1)

    end = odeint(func, one(), INTERVAL, step_size=0.25, trajectory=budget(keep))[-1]
    torch.set_default_dtype(torch.float64)
    try:
        (found,) = torch.autograd.grad(end.sum(), w)
    finally:
        torch.set_default_dtype(torch.float32)
    tenth = torch.full((1,), 0.1).double().item()
    assert found.item() == pytest.approx(-tenth * math.exp(-tenth), rel=1e-6)


def test_random_states_are_left_alone_where_they_are_not_to_be_kept() -> None:
    w = one().requires_grad_()
    drawing = {"on_mismatch": "ignore", "preserve_rng_state": False, "trajectory": budget("solution")}

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -w * u * torch.rand(1, dtype=u.dtype)

    end = odeint(func, one(), INTERVAL, step_size=0.25, **drawing)[-1]
    before = torch.get_rng_state()
    torch.autograd.grad(end.sum(), w)
    assert not torch.equal(before, torch.get_rng_state())


def test_draws_that_begin_after_the_first_step_are_right_from_the_second_solve_on() -> None:
    w = one().requires_grad_()

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -w * u * (1.0 + torch.rand(1, dtype=u.dtype) if t > 0.5 else 1.0)

    solve = NeuralODE(func, step_size=0.1, params=[w], trajectory=budget("solution"))

    def ours() -> torch.Tensor:
        torch.manual_seed(3)
        return torch.autograd.grad(solve(one(), INTERVAL)[-1].sum(), w)[0]

    with pytest.raises(RuntimeError, match="draws random numbers, but did not in its first step"):
        ours()
    torch.manual_seed(3)
    (wanted,) = torch.autograd.grad(plain_steps(func, one(), 10, "4").sum(), w)
    assert distance(ours(), wanted) <= 1e-12


@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
@pytest.mark.parametrize("method", ["cn", "arkimex_3"])
def test_implicit_steps_refuse_an_f_with_another_value_each_time(kind: str, method: str) -> None:
    func, start = layers(kind), random(5, 4)

    def solve() -> Any:
        return odeint(lambda t, u: func(u), start, INTERVAL, step_size=0.25, method=method)[-1].sum().backward()

    if kind == "dropout":
        with pytest.raises(Exception, match=r"another value each time|nonlinear solve") as raised:
            solve()
        assert isinstance(raised.value, ValueError | ArithmeticError)
    else:
        solve()
