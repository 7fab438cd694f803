"""Learn the vector field of a spiral from pieces of one trajectory, with a small network.

Written for torchdiffeq: its import line alone is changed.
"""

from __future__ import annotations

import torch
from torch import nn

from pnode_dist.torchdiffeq import odeint_adjoint as odeint

ROTATION = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)


class Spiral(nn.Module):
    """The cubic spiral that makes the data."""

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return dy/dt for states `[..., 2]`."""
        return y**3 @ ROTATION


class Field(nn.Module):
    """A network of one hidden layer, of the cubes of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for layer in (self.net[0], self.net[2]):
            nn.init.normal_(layer.weight, std=0.1)
            nn.init.zeros_(layer.bias)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return dy/dt for states `[..., 2]`."""
        return self.net(y**3)


def train(iterations: int = 5) -> tuple[list[float], nn.Module]:
    """Return the loss of each iteration, and the trained network."""
    torch.manual_seed(0)
    times = torch.linspace(0.0, 25.0, 1000, dtype=torch.float64)
    with torch.no_grad():
        truth = odeint(Spiral(), torch.tensor([[2.0, 0.0]], dtype=torch.float64), times, method="dopri5")
    field = Field().double()
    optimiser = torch.optim.SGD(field.parameters(), lr=0.1)
    losses = []
    for _ in range(iterations):
        begin = torch.randint(0, 990, (20,))
        wanted = torch.stack([truth[begin + step] for step in range(10)])
        optimiser.zero_grad()
        loss = (odeint(field, truth[begin], times[:10]) - wanted).abs().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, field


if __name__ == "__main__":
    for number, value in enumerate(train()[0], start=1):
        print(f"iteration {number}  loss {value:.6f}")
