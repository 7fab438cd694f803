"""Problem with a wrong gradient of the continuous adjoint: few Euler steps, a right-hand side with kinks.

The state decays, so a solve backward in time amplifies the discretisation error of the few steps. The adjoint is then
linearized about states that differ from those of the forward solve. Reverse-accurate methods have no such error,
because they use the states of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pnode_dist.bench.methods.gradient_methods import GRADIENT_METHODS, GradientMethod
from pnode_dist.bench.report import Row

METHOD, STEPS = "euler", 8
ITERATIONS = 150
_DECAY, _HIDDEN, _SAMPLES, _RATE, _SEED = 6.0, 32, 128, 1e-2, 0
_SHOWN = 10
TRAINED = ("NODE-cont", "solution")
"""Trained gradient methods: the continuous adjoint, and this project's, whose gradient is the same at every level."""


class DecayingRelu(nn.Module):
    """du/dt = W2 relu(W1 u + b1) + b2 - 6 u for u in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 2)).double()

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """du/dt."""
        rate: torch.Tensor = self.layers(u) - _DECAY * u
        return rate


class Regression:
    """Regression of a smooth map of points in the plane by one block."""

    def __init__(self, gradient_method: GradientMethod) -> None:
        torch.manual_seed(_SEED)
        self.func = DecayingRelu()
        self.block = gradient_method.block(self.func, METHOD, STEPS)
        self.points = 2 * torch.rand(_SAMPLES, 2, dtype=torch.float64) - 1
        self.points.requires_grad_()
        x, y = self.points.detach().unbind(dim=1)
        self.images = torch.stack([torch.sin(3 * y), x * x - y], dim=1)

    def loss(self) -> torch.Tensor:
        """Return the mean squared error."""
        error: torch.Tensor = self.block(self.points) - self.images
        return error.square().mean()

    def gradient(self) -> torch.Tensor:
        """Return the gradient of the loss with respect to all parameters."""
        self.block.zero_grad()
        self.loss().backward()  # type: ignore[no-untyped-call]
        return torch.cat([p.grad.reshape(-1) for p in self.block.parameters() if p.grad is not None])

    def trained(self, iterations: int) -> list[float]:
        """Return the losses before each iteration of Adam, and after the last."""
        optimizer = torch.optim.Adam(self.block.parameters(), lr=_RATE)
        losses = []
        for _ in range(iterations):
            optimizer.zero_grad()
            loss = self.loss()
            losses.append(loss.item())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            losses.append(self.loss().item())
        return losses


@dataclass(frozen=True)
class TrainingHistory:
    """Relative gradient errors of each method before and after training, and the training losses."""

    errors: Sequence[Row]
    curves: Sequence[Row]


def compare_while_training(gradient_methods: Sequence[GradientMethod], iterations: int = ITERATIONS) -> TrainingHistory:
    """Train, and compare the gradient of each method with back-propagation through the same steps.

    The comparison after training uses the parameters trained by this project.
    """
    regressions = {name: Regression(GRADIENT_METHODS[name]) for name in TRAINED}
    losses = {name: regression.trained(iterations) for name, regression in regressions.items()}
    trained = regressions[TRAINED[-1]].func.state_dict()
    naive = GRADIENT_METHODS["NODE-naive"]
    before, after = _gradient(naive, None), _gradient(naive, trained)
    errors: list[Row] = [
        {
            "method": gradient_method.name,
            "untrained": _error(_gradient(gradient_method, None), before),
            "trained": _error(_gradient(gradient_method, trained), after),
        }
        for gradient_method in gradient_methods
    ]
    shown = range(0, iterations + 1, max(iterations // _SHOWN, 1))
    curves: list[Row] = [{"iteration": n, **{name: found[n] for name, found in losses.items()}} for n in shown]
    return TrainingHistory(errors, curves)


def _gradient(gradient_method: GradientMethod, parameters: dict[str, torch.Tensor] | None) -> torch.Tensor:
    regression = Regression(gradient_method)
    if parameters is not None:
        regression.func.load_state_dict(parameters)
    return regression.gradient()


def _error(gradient: torch.Tensor, exact: torch.Tensor) -> float:
    return float((gradient - exact).norm() / exact.norm())
