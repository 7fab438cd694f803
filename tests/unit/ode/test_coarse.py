"""A solve that takes one step because nothing else was said warns where that is plainly too long."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import NeuralODE, odeint
from pnode_dist.ode import coarse
from tests.oracles.right_hand_sides import Network, distance, random

ONE = torch.ones(1, dtype=torch.float64)


@pytest.fixture(autouse=True)
def nothing_looked_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(coarse, "_looked_at", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def growth(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return u


@pytest.mark.parametrize("keep", [False, True])
def test_one_step_that_is_plainly_too_long_warns_once(keep: bool) -> None:
    start = ONE.clone().requires_grad_(keep)
    with pytest.warns(RuntimeWarning, match="one step of 'euler' from t = 0 to 5.9 is too long") as caught:
        found = odeint(growth, start, [0.0, 5.9], method="euler")[-1]
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "step_size=" in message
    assert "rtol=" in message
    assert "56% elsewhere" in message
    assert "\n" not in message
    assert abs(found.item() - 6.9) <= 1e-14
    assert odeint(growth, start, [0.0, 5.9], method="euler")[-1].item() == found.item()


@pytest.mark.parametrize(
    "settings",
    [
        {"step_size": 5.9},
        {"rtol": 1e-3},
        {"t": [0.0, 3.0, 5.9]},
        {"method": "rk4", "t": [0.0, 1.0]},
        {"method": "beuler", "t": [0.0, 0.1]},
    ],
    ids=str,
)
def test_what_was_asked_for_or_is_fine_enough_does_not_warn(settings: dict[str, Any]) -> None:
    method = None if "rtol" in settings else "euler"
    given = {"method": method, "t": [0.0, 5.9], **settings}
    odeint(growth, ONE, **given)


def test_a_kind_of_solve_is_looked_at_on_its_first_call_alone() -> None:
    # What f counts in a variable or a list is put back.
    calls = count()

    def counted(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        next(calls)
        return -u

    node = NeuralODE(counted, method="rk4")
    node(ONE, [0.0, 0.1])
    assert node.last_solve.function_evaluations == 4
    assert next(calls) == 12
    node(ONE, [0.0, 0.1])
    NeuralODE(counted, method="rk4")(ONE, [0.0, 0.1])
    assert next(calls) == 21


class Noisy(nn.Module):
    """f that draws random numbers and counts its evaluations in a buffer and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.calls = 0
        self.weight = nn.Parameter(ONE.clone())

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.calls += 1
        return self.weight * (u + 0.01 * torch.rand_like(u))


@pytest.mark.parametrize("gradient", [False, True])
def test_looking_leaves_no_trace(gradient: bool) -> None:
    found = []
    for step_size in (None, 5.0):
        torch.manual_seed(3)
        func, start = Noisy(), ONE.clone().requires_grad_(gradient)
        with warnings.catch_warnings(), torch.set_grad_enabled(gradient):
            warnings.simplefilter("ignore")
            node = NeuralODE(func, method="rk4", step_size=step_size)
            end = node(start, [0.0, 5.0])[-1]
        gradients = torch.autograd.grad(end.sum(), [start, func.weight]) if gradient else ()
        drawn = torch.rand(3)
        found.append((end.detach(), *gradients, drawn, func.seen.clone(), torch.tensor(func.calls)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][-1].item() == 4


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_f_that_fails_between_does_not_make_a_solve_fail(method: str) -> None:
    def picky(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if 0.1 < t < 0.2:
            raise ValueError("not there")
        return -u

    start = ONE.clone().requires_grad_()
    end = odeint(picky, start, [0.0, 0.3], method="heun" if method == "rk4" else method)[-1]
    (found,) = torch.autograd.grad(end.sum(), start)
    wanted = 1 - 0.3 + 0.045 if method == "rk4" else 0.85 / 1.15
    assert abs(found.item() - wanted) <= 1e-9


@pytest.mark.parametrize("method", ["rk4", "cn", "arkimex_3", "ssp_rks2", "bdf"])
def test_a_solve_is_the_same_whether_it_is_looked_at_or_not(method: str) -> None:
    network, u0 = Network(), random(2, 3)
    with torch.no_grad():
        first = odeint(network, u0, [0.0, 0.1], method=method)
        again = odeint(network, u0, [0.0, 0.1], method=method)
        asked = odeint(network, u0, [0.0, 0.1], method=method, step_size=0.1)
    assert torch.equal(first, again)
    assert distance(first, asked) == 0
