"""Fit a continuous normalizing flow to two circles. A hyper-network makes its weights from the time.

The state is a tuple of points and logarithms of densities. The solve goes backward in time, from the data to a normal
distribution. Written for torchdiffeq: its import line alone is changed.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from pnode_dist.torchdiffeq import odeint_adjoint as odeint

WIDTH = 16


class HyperNetwork(nn.Module):
    """The weights of a layer of `WIDTH` planar flows, as a function of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 7 * WIDTH))

    def forward(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the inner weights `[2, WIDTH]`, the biases `[WIDTH]` and the outer weights `[WIDTH, 2]`."""
        inner, outer, gates, biases = self.net(t.reshape(1, 1)).reshape(-1).split([2 * WIDTH] * 3 + [WIDTH])
        return inner.reshape(2, WIDTH), biases, (outer * torch.sigmoid(gates)).reshape(WIDTH, 2)


class Flow(nn.Module):
    """The rates of points `[batch, 2]` and of the logarithms of their densities `[batch, 1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = HyperNetwork()

    def forward(self, t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return the velocity, and the negative trace of its Jacobian."""
        points = state[0]
        with torch.enable_grad():
            points.requires_grad_(True)
            inner, biases, outer = self.weights(t)
            velocity = torch.tanh(points @ inner + biases) @ outer / WIDTH
            trace = torch.zeros_like(points[:, 0])
            for axis in range(2):
                (row,) = torch.autograd.grad(velocity[:, axis].sum(), points, create_graph=True)
                trace = trace + row[:, axis]
        return velocity, -trace[:, None]


def circles(count: int) -> torch.Tensor:
    """Return noisy points `[count, 2]` on two circles."""
    angle = 2 * math.pi * torch.rand(count, dtype=torch.float64)
    radius = torch.where(torch.arange(count) % 2 == 0, 1.0, 0.5)
    points = radius * torch.stack([torch.cos(angle), torch.sin(angle)])
    return points.T + 0.06 * torch.randn(count, 2)


def train(iterations: int = 3) -> tuple[list[float], nn.Module]:
    """Return the negative logarithm of the likelihood in each iteration, and the trained flow."""
    torch.manual_seed(0)
    flow = Flow().double()
    times = torch.tensor([10.0, 0.0], dtype=torch.float64)
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-3)
    normal = torch.distributions.Normal(0.0, math.sqrt(0.1))
    losses = []
    for _ in range(iterations):
        optimiser.zero_grad()
        points = circles(64)
        ends, changes = odeint(flow, (points, torch.zeros_like(points[:, :1])), times, method="dopri5")
        loss = -(normal.log_prob(ends[-1]).sum(dim=1) - changes[-1][:, 0]).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, flow


if __name__ == "__main__":
    for number, value in enumerate(train()[0], start=1):
        print(f"iteration {number}  negative log-likelihood {value:.4f}")
