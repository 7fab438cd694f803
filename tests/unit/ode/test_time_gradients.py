"""The gradient with respect to the evaluation times, against plain torch and against difference quotients."""

from itertools import pairwise

import pytest
import torch

from pnode_dist import NeuralODE, SplitFunction, Trajectory
from tests.oracles.arkimex_tableaux import ARKIMEX
from tests.oracles.collocation import COLLOCATION
from tests.oracles.implicit import CRANK_NICOLSON, odeint_implicit
from tests.oracles.right_hand_sides import Network, random

TIGHT = {"snes_rtol": 1e-13, "snes_stol": 1e-15, "ksp_rtol": 1e-13}
TIMES = [0.2, 0.5, 0.9]


class Clocked(Network):
    """A network that the time drives as well."""

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return super().forward(t, u) * torch.cos(3 * t) + t * u


def classical(f: torch.nn.Module, u: torch.Tensor, times: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The classical Runge-Kutta method with so many equal steps in each interval."""
    outputs = [u]
    for (begin, end), count in zip(pairwise(times), counts, strict=True):
        h = (end - begin) / count
        for step in range(count):
            t = begin + step * h
            a = f(t, u)
            b = f(t + h / 2, u + h / 2 * a)
            c = f(t + h / 2, u + h / 2 * b)
            d = f(t + h, u + h * c)
            u = u + h / 6 * (a + 2 * b + 2 * c + d)
        outputs.append(u)
    return torch.stack(outputs)


def objective(states: torch.Tensor) -> torch.Tensor:
    return states[1:].square().sum() + states[1].prod()


@pytest.mark.parametrize("times", [TIMES, TIMES[::-1]], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("keep", ["solution", "stages", "graph"])
def test_it_is_that_of_plain_torch_for_explicit_steps(times: list[float], keep: str) -> None:
    f, u0 = Clocked(), random(2, 3).requires_grad_()
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    node = NeuralODE(f, method="rk4", step_size=0.15, trajectory=Trajectory(ram="1MiB", keep=keep))
    found = torch.autograd.grad(objective(node(u0, t)), [t, u0, *f.parameters()])
    counts = [2, 3] if times == TIMES else [3, 2]
    wanted = torch.autograd.grad(objective(classical(f, u0, t, counts)), [t, u0, *f.parameters()])
    for value, other in zip(found, wanted, strict=True):
        assert torch.allclose(value, other, rtol=1e-11, atol=1e-13)


ORACLES = {"cn": CRANK_NICOLSON, "arkimex_3": ARKIMEX["3"], "gauss4": COLLOCATION["gauss4"]}


@pytest.mark.parametrize("newton", ["auto", "petsc"])
@pytest.mark.parametrize("method", ORACLES)
def test_it_is_that_of_the_dense_oracle_for_implicit_steps(method: str, newton: str) -> None:
    f, g, u0 = Clocked(), Clocked(), random(2, 3).requires_grad_()
    t = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    split = method.startswith("arkimex")
    func = SplitFunction(implicit=f, explicit=g) if split else f
    options = TIGHT if newton == "petsc" else {"snes_rtol": 1e-13, "snes_stol": 1e-15}
    node = NeuralODE(func, method=method, step_size=0.15, options=options, newton=newton)
    (found,) = torch.autograd.grad(objective(node(u0, t)), t)
    states = odeint_implicit(f, u0, t, ORACLES[method], 0.15, explicit=g if split else None)
    (wanted,) = torch.autograd.grad(objective(states), t)
    assert torch.allclose(found, wanted, rtol=1e-10)


def test_with_error_control_steps_are_fixed_shares_of_their_intervals() -> None:
    f, u0 = Clocked(), random(2, 3)
    t = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    node = NeuralODE(f, rtol=1e-9, atol=1e-11)
    (found,) = torch.autograd.grad(objective(node(u0, t)), t)
    # Of the exact flow: with tight tolerances the steps do not matter.
    (wanted,) = torch.autograd.grad(objective(classical(f, u0, t, [400, 400])), t)
    assert torch.allclose(found, wanted, rtol=1e-6)


def test_times_alone_may_require_a_gradient_and_have_their_own_type() -> None:
    t = torch.tensor(TIMES, requires_grad=True)
    states = NeuralODE(lambda t, u: -u, step_size=0.01)(torch.ones(1, dtype=torch.float64), t)
    states[-1].sum().backward()
    assert t.grad is not None
    assert t.grad.dtype == torch.float32
    assert t.grad[-1].item() == pytest.approx(-states[-1].item(), rel=1e-6)
    assert t.grad[0].item() == pytest.approx(states[-1].item(), rel=1e-6)


def test_a_single_time_has_no_gradient() -> None:
    t = torch.tensor([0.3], requires_grad=True)
    NeuralODE(Clocked())(random(2, 3).requires_grad_(), t).sum().backward()
    assert t.grad is not None
    assert t.grad.tolist() == [0.0]
