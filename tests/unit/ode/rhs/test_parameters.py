"""The tensors that a right-hand side is differentiated with respect to: those of one node, and those of attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from torch import nn

from pnode_dist import odeint
from pnode_dist import torchdiffeq as here
from tests.oracles.right_hand_sides import distance, gradients, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
U0 = random(3)
Func = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Make = Callable[[torch.Tensor], Func]


def of_chunks(w: torch.Tensor) -> Func:
    a, b = (w * 1.5).reshape(-1).chunk(3)[:2]
    return lambda t, u: -a * u + torch.sin(b) * t


def of_one_chunk(w: torch.Tensor) -> Func:
    _, b, _ = torch.tanh(w).unbind()
    return lambda t, u: -b * u


def of_chunks_and_a_result_of_one(w: torch.Tensor) -> Func:
    a, b, _ = torch.tanh(w).unbind()
    c = torch.exp(b)
    return lambda t, u: -a * u + c * t - torch.sin(b) * u


def of_eigenvectors(w: torch.Tensor) -> Func:
    values, vectors = torch.linalg.eigh(w + w.T)
    return lambda t, u: -(vectors @ (values.square() * (vectors.T @ u))) + t


@pytest.mark.parametrize("make", [of_chunks, of_one_chunk, of_chunks_and_a_result_of_one, of_eigenvectors])
def test_outputs_of_one_operation_get_the_gradient_of_plain_torch(make: Make) -> None:
    w = random(3, 3, seed=4).requires_grad_()
    wanted = gradients(lambda u: odeint_plain(make(w), u, TIMES, TABLEAUX["4"]), U0, [w])
    found = gradients(lambda u: odeint(make(w), u, TIMES, method="rk4"), U0, [w])
    assert all(entry.any() for entry in wanted)
    assert distance(found, wanted) < 1e-12
    theirs = gradients(lambda u: torchdiffeq.odeint(make(w), u, TIMES, method="rk4"), U0, [w])
    ours = gradients(lambda u: here.odeint(make(w), u, TIMES, method="rk4"), U0, [w])
    assert distance(ours, theirs) < 1e-12


class Hidden:
    """An object without a dictionary, which the search of parameters does not look into."""

    __slots__ = ("b",)

    def __init__(self, b: torch.Tensor) -> None:
        self.b = b


def test_a_hidden_output_of_the_operation_of_a_found_one_is_asked_for() -> None:
    w = random(6, seed=4).requires_grad_()
    a, b = (w * 1.5).chunk(2)
    hidden = Hidden(b)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -a * u + torch.sin(hidden.b) * t

    with pytest.raises(ValueError, match=r"name it with params=\(\.\.\.\), or with adjoint_params=\(\.\.\.\) of"):
        odeint(func, U0, TIMES, method="rk4").sum().backward()
    wanted = torch.autograd.grad(odeint_plain(func, U0, TIMES, TABLEAUX["4"]).sum(), w, retain_graph=True)
    found = torch.autograd.grad(odeint(func, U0, TIMES, method="rk4", params=(b,)).sum(), w)
    assert distance(found[0], wanted[0]) < 1e-12


class Unregistered(nn.Module):
    """Leaves and a module that `parameters()` does not return."""

    def __init__(self, w: torch.Tensor) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, dtype=torch.float64)
        self.inner.plain = w
        self.named = {"scale": random(3, seed=8).requires_grad_()}
        self.layers = [nn.Linear(3, 3, dtype=torch.float64)]
        self.last: Any = None

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        self.last = torch.tanh(self.inner(u) * self.inner.plain)
        return self.named["scale"] * self.layers[0](self.last) - t * u


def test_leaves_among_plain_attributes_of_modules_get_gradients() -> None:
    w = random(3, seed=5).requires_grad_()
    func = Unregistered(w)
    leaves = [w, func.named["scale"], *func.inner.parameters(), *func.layers[0].parameters()]
    # The second solve begins with an intermediate result of the first one as an attribute.
    for _ in range(2):
        found = gradients(lambda u: odeint(func, u, TIMES, method="rk4"), U0, leaves)
    wanted = gradients(lambda u: odeint_plain(func, u, TIMES, TABLEAUX["4"]), U0, leaves)
    assert distance(found, wanted) < 1e-12


class Bounded(nn.Module):
    """A module with an intermediate result as an attribute."""

    def __init__(self, w: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)
        self.bounded = torch.tanh(self.w)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -self.bounded * u + self.w * t


def test_other_attributes_of_modules_are_left_alone() -> None:
    layer = torch.nn.Linear(2, 2, dtype=torch.float64)
    for name, value in {"array": np.ones(3), "empty": [], "numbers": [1.0, 2.0], "names": {"a": "b"}}.items():
        setattr(layer, name, value)
    start = torch.ones(2, dtype=torch.float64)
    odeint(lambda t, u: layer(u), start, TIMES, method="rk4").sum().backward()
    assert layer.weight.grad is not None


def test_a_result_that_a_module_holds_is_asked_for_and_right_when_named() -> None:
    plain, refused, named = (Bounded(random(3, seed=5)) for _ in range(3))
    wanted = gradients(lambda u: torchdiffeq.odeint(plain, u, TIMES, method="rk4"), U0, [plain.w])
    with pytest.raises(ValueError, match=r"with adjoint_params=\(\.\.\.\) of pnode_dist.torchdiffeq.odeint_adjoint"):
        gradients(lambda u: here.odeint(refused, u, TIMES, method="rk4"), U0, [refused.w])
    params = (named.w, named.bounded)
    found = gradients(
        lambda u: here.odeint_adjoint(named, u, TIMES, method="rk4", adjoint_params=params), U0, [named.w]
    )
    assert distance(found, wanted) < 1e-12


class Problem:
    """A plain object that has a right-hand side, and tensors that it does not use."""

    def __init__(self) -> None:
        self.rate = random(3, seed=6).requires_grad_()
        self.other = random(3, seed=7).requires_grad_()

    def derivative(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -self.rate.square() * u + t


def test_the_attributes_that_a_bound_method_reads_get_gradients() -> None:
    problem = Problem()
    wanted = gradients(lambda u: odeint_plain(problem.derivative, u, TIMES, TABLEAUX["4"]), U0, [problem.rate])
    found = gradients(lambda u: odeint(problem.derivative, u, TIMES, method="rk4"), U0, [problem.rate])
    assert distance(found, wanted) < 1e-12
    states = here.odeint_adjoint(problem.derivative, U0, TIMES, adjoint_params=(problem.rate,))
    assert states.requires_grad
