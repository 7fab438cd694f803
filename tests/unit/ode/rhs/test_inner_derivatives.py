"""Right-hand sides that take a gradient inside, as Hamiltonian networks do, against the same field written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import NeuralODE, Trajectory, odeint
from tests.oracles.implicit import CRANK_NICOLSON, odeint_implicit
from tests.oracles.right_hand_sides import distance, gradients, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.0, 0.4, 1.0]
STEP_SIZE = 0.25
STYLES = ["needs a graph", "marks its state", "enables gradients"]
TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-13, "snes_stol": 1e-14, "ksp_rtol": 1e-13, "ksp_atol": 1e-50}
METHODS: dict[str, dict[str, Any]] = {
    "rk4": {"method": "rk4", "step_size": STEP_SIZE},
    "cn": {"method": "cn", "step_size": STEP_SIZE, "options": TIGHT},
    "dopri5": {"method": "dopri5", "rtol": 1e-5, "atol": 1e-7},
}
EVERY_STYLE = pytest.mark.parametrize("style", STYLES)
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
EVERY_LEVEL = pytest.mark.parametrize("keep", ["solution", "stages", "graph"])


class Hamiltonian(nn.Module):
    """(dp, dq)/dt = (-dH/dq, dH/dp) with H(p, q) = w2 . tanh(W1 (p, q)), by a gradient that is taken inside."""

    def __init__(self, style: str = "needs a graph") -> None:
        super().__init__()
        self.inner, self.outer = nn.Parameter(random(8, 2, seed=2)), nn.Parameter(random(8, seed=3))
        self.style = style

    def energy(self, u: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(u @ self.inner.T) @ self.outer).sum()

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if self.style == "marks its state" and not u.requires_grad:
            u.requires_grad_()
        if self.style != "enables gradients":
            return rotated(torch.autograd.grad(self.energy(u), u, create_graph=True)[0])
        with torch.enable_grad():
            u = u if u.requires_grad else u.detach().requires_grad_()
            return rotated(torch.autograd.grad(self.energy(u), u, create_graph=True)[0])

    def written_out(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return rotated(((1 - torch.tanh(u @ self.inner.T) ** 2) * self.outer) @ self.inner)


def rotated(gradient: torch.Tensor) -> torch.Tensor:
    return torch.stack([-gradient[..., 1], gradient[..., 0]], -1)


def wanted(func: Hamiltonian, u: torch.Tensor, method: str) -> torch.Tensor:
    """The same steps on the field written out, in plain torch where their sizes are given."""
    if method == "rk4":
        found: torch.Tensor = odeint_plain(func.written_out, u, TIMES, TABLEAUX["4"], STEP_SIZE)
        return found
    if method == "cn":
        return odeint_implicit(func.written_out, u, TIMES, CRANK_NICOLSON, STEP_SIZE)
    return odeint(func.written_out, u, TIMES, params=list(func.parameters()), **METHODS[method])


@EVERY_STYLE
@EVERY_METHOD
@EVERY_LEVEL
def test_gradients_are_those_of_the_field_written_out(style: str, method: str, keep: str) -> None:
    func, u0 = Hamiltonian(style), random(3, 2)
    parameters = list(func.parameters())
    budget = Trajectory(ram="1MiB", keep=keep)

    def solve(u: torch.Tensor) -> torch.Tensor:
        return odeint(func, u, TIMES, trajectory=budget, **METHODS[method])

    oracle = gradients(lambda u: wanted(func, u, method), u0, parameters)
    for _ in range(2):  # The second time it is known that func needs a graph.
        assert distance(gradients(solve, u0, parameters), oracle) < 1e-10


@EVERY_STYLE
@EVERY_METHOD
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_without_a_gradient_are_those_of_the_field_written_out(style: str, method: str, mode: Any) -> None:
    func, u0 = Hamiltonian(style), random(3, 2)
    with mode():
        found = odeint(func, u0, TIMES, **METHODS[method])
    assert not found.requires_grad
    assert distance(found.clone(), wanted(func, u0, method).detach()) < 1e-10
    assert not u0.requires_grad


@EVERY_STYLE
@pytest.mark.parametrize("slots", [1, 3])
def test_steps_that_are_recomputed_give_the_same_gradient(style: str, slots: int) -> None:
    func, u0 = Hamiltonian(style), random(3, 2)
    node = NeuralODE(func, method="rk4", step_size=0.05, trajectory=Trajectory(ram_slots=slots))

    def plain(u: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = odeint_plain(func.written_out, u, TIMES, TABLEAUX["4"], 0.05)
        return found

    parameters = list(func.parameters())
    assert distance(gradients(lambda u: node(u, TIMES), u0, parameters), gradients(plain, u0, parameters)) < 1e-12
    assert node.last_solve.recomputed_steps > 20


@EVERY_METHOD
def test_the_caller_s_state_and_the_parameters_are_left_as_they_were(method: str) -> None:
    func, u0 = Hamiltonian("marks its state"), random(3, 2)
    before = u0.clone()
    with torch.no_grad():
        odeint(func, u0, TIMES, **METHODS[method])
    assert torch.equal(u0, before)
    assert not u0.requires_grad
    assert all(parameter.requires_grad and parameter.grad is None for parameter in func.parameters())


@EVERY_METHOD
def test_another_error_of_torch_is_raised_as_it_is(method: str) -> None:
    def wrong(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u @ torch.ones(5, 5, dtype=u.dtype)

    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        odeint(wrong, random(3, 2), TIMES, **METHODS[method])


def test_random_numbers_of_a_func_that_is_recomputed_with_a_graph_are_drawn_once() -> None:
    class Noisy(Hamiltonian):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            drawn.append(torch.rand(()).item())
            return super().forward(t, u)

    drawn: list[float] = []
    torch.manual_seed(7)
    with torch.no_grad():
        odeint(Noisy(), random(3, 2), [0.0, 1.0], method="euler", step_size=0.5)
    torch.manual_seed(7)
    sequence = torch.rand(2).tolist()
    assert drawn == [sequence[0], *sequence]
    assert torch.rand(()).item() == pytest.approx(torch.rand(3, generator=torch.Generator().manual_seed(7))[2].item())
