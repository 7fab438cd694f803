"""The baselines take the steps of published tables, and all but the continuous adjoint have the gradient of these."""

from __future__ import annotations

import math

import pytest
import torch
import torchdiffeq
from torch import nn

from pnode_dist import NeuralODE
from pnode_dist.bench.methods.baselines import TABLES, Aca, Anode, Continuous, Naive

STEPS = 3


class Pair(nn.Module):
    """A right-hand side of time and of a state in two parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, t: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        z, total = state
        rate = torch.tanh(self.layer(torch.cat([z, t.expand(len(z), 1)], dim=1)))
        return rate, rate.square().sum(dim=1) - total


class First(nn.Module):
    """The first part alone, whose rate does not depend on the second."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.pair(t, (z, z.new_zeros(len(z))))[0]


def start() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 2, dtype=torch.float64, requires_grad=True), torch.zeros(4, dtype=torch.float64)


def gradients(block: nn.Module) -> list[torch.Tensor]:
    z, total = start()
    block.zero_grad()
    end = block((z, total))
    (end[0].sin().sum() + end[1].square().sum()).backward()
    return [z.grad, *(parameter.grad for parameter in block.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("method", TABLES)
def test_the_tables_have_the_order_of_their_methods(method: str) -> None:
    table = TABLES[method]
    order = {"euler": 1, "midpoint": 2, "bosh3": 3, "rk4": 4, "dopri5": 5}[method]
    assert [math.fsum(row) for row in table.a] == pytest.approx(table.c)
    for power in range(order):
        weighted = math.fsum(b * c**power for b, c in zip(table.b, table.c, strict=True))
        assert weighted == pytest.approx(1 / (power + 1), abs=1e-15)

    class Growth(nn.Module):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return u * torch.cos(t)

    one = torch.ones(1, dtype=torch.float64)
    errors = [abs(Naive(Growth(), method, steps)(one).item() - math.exp(math.sin(1.0))) for steps in (8, 16)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("method", TABLES)
def test_all_but_the_continuous_adjoint_have_the_gradient_of_the_same_steps(method: str) -> None:
    func = Pair()
    exact = gradients(Naive(func, method, STEPS))
    node = NeuralODE(func, method=method, step_size=1 / STEPS)

    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.node = node

        def forward(self, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return tuple(part[-1] for part in self.node(state, [0.0, 1.0]))

    for block in (Anode(func, method, STEPS), Aca(func, method, STEPS), Ours()):
        for one, other in zip(gradients(block), exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    continuous = gradients(Continuous(func, method, STEPS))
    error = max(float((one - other).norm() / other.norm()) for one, other in zip(continuous, exact, strict=True))
    # As small as the steps are, and no smaller.
    assert 1e-9 < error < 0.5


def test_the_gradient_of_back_propagation_is_that_of_central_differences() -> None:
    block = Naive(Pair(), "dopri5", STEPS)
    analytic = gradients(block)[1]
    with torch.no_grad():
        for entry in range(analytic.numel()):
            losses = []
            for shift in (1e-6, -2e-6):
                block.func.layer.weight.view(-1)[entry] += shift  # type: ignore[union-attr, index, operator]
                end = block(start())
                losses.append(end[0].sin().sum() + end[1].square().sum())
            block.func.layer.weight.view(-1)[entry] += 1e-6  # type: ignore[union-attr, index, operator]
            assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(analytic.view(-1)[entry].item(), abs=1e-8)


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_the_continuous_adjoint_is_torchdiffeq_s_with_its_own_steps(method: str) -> None:
    func, (z, _) = First(Pair()), start()
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    theirs = torchdiffeq.odeint_adjoint(func, z, times, method=method, options={"step_size": 1 / STEPS})[-1]
    ours = Continuous(func, method, STEPS)(z)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    wanted = [z, *func.parameters()]
    for one, other in zip(
        torch.autograd.grad(ours.sin().sum(), wanted), torch.autograd.grad(theirs.sin().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
