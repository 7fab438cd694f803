"""Stiff right-hand sides to solve implicitly, with parameters in every part."""

from __future__ import annotations

import torch
from torch import nn

from tests.oracles.right_hand_sides import Network


class Decay(nn.Module):
    """du/dt = -exp(r) (u + u^3 / 10) + cos(t) c: nonlinear decay at rates from 1 to 100, not autonomous."""

    def __init__(self, features: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        rates = torch.linspace(0.0, 4.6, features, dtype=torch.float64)
        self.logarithms_of_rates = nn.Parameter(rates.to(dtype))
        self.drive = nn.Parameter(torch.linspace(0.5, 1.5, features, dtype=torch.float64).to(dtype))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -torch.exp(self.logarithms_of_rates) * (u + u**3 / 10) + torch.cos(t) * self.drive


class StiffNetwork(nn.Module):
    """The sum of `Decay`, the stiff part, and of `Network`, the other: on the last axis of u."""

    def __init__(self, features: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.stiff = Decay(features, dtype)
        self.other = Network(features, dtype=dtype)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.stiff(t, u) + self.other(t, u)
        return result


class Constrained(nn.Module):
    """M du/dt = f with an algebraic last equation, 0 = u_3 + tanh(u_3) - W [u_1, u_2] - cos(t), solvable for u_3."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network(3)
        self.weight = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        slopes = self.network(t, u)[..., :2] - u[..., :2] * u[..., 2:] ** 2
        return torch.cat([slopes, self.constraint(t, u)], dim=-1)

    def constraint(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """The left side of the algebraic equation, `[..., 1]`."""
        algebraic = u[..., 2:]
        return algebraic + torch.tanh(algebraic) - u[..., :2] @ self.weight[:, None] - torch.cos(t)
