"""Fit a latent ODE to noisy spirals: a recognition network reads a path, and a decoder reads the latent path.

Written for torchdiffeq: its import line alone is changed.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from pnode_dist.torchdiffeq import odeint

LATENT, NOISE = 4, 0.3


class LatentField(nn.Module):
    """The rate of the latent state `[paths, LATENT]`. It counts its evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(LATENT, 20), nn.ELU(inplace=True), nn.Linear(20, 20), nn.ELU(inplace=True), nn.Linear(20, LATENT)
        )
        self.evaluations = 0

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return dz/dt."""
        self.evaluations += 1
        return self.net(z)


class Recognition(nn.Module):
    """A recurrent network that reads paths `[paths, times, 2]` from their end to their start."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(2, 25)
        self.out = nn.Linear(25, 2 * LATENT)

    def forward(self, paths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and logarithm of the variance of the first latent state."""
        hidden = paths.new_zeros(len(paths), 25)
        for number in reversed(range(paths.shape[1])):
            hidden = self.cell(paths[:, number], hidden)
        mean, log_variance = self.out(hidden).chunk(2, dim=1)
        return mean, log_variance


def spirals(count: int, times: torch.Tensor) -> torch.Tensor:
    """Return noisy spirals, `[count, time, 2]`, of which every second one turns the other way."""
    angle = times + 2 * math.pi * torch.rand(count, 1, dtype=times.dtype)
    radius = 0.3 * angle
    turn = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)[:, None]
    paths = torch.stack([radius * torch.cos(angle), turn * radius * torch.sin(angle)], dim=-1)
    return paths + NOISE * torch.randn_like(paths)


def train(iterations: int = 3) -> tuple[list[float], nn.Module]:
    """Return the negative evidence bound of each iteration, and the trained networks."""
    torch.manual_seed(0)
    times = torch.linspace(0.0, 3.0, 30, dtype=torch.float64)
    paths = spirals(16, times)
    model = nn.ModuleDict(
        {
            "field": LatentField(),
            "recognition": Recognition(),
            "decoder": nn.Sequential(nn.Linear(LATENT, 20), nn.ReLU(inplace=True), nn.Linear(20, 2)),
        }
    ).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(iterations):
        optimiser.zero_grad()
        mean, log_variance = model["recognition"](paths)
        start = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        latent = odeint(model["field"], start, times).permute(1, 0, 2)
        misfit = ((model["decoder"](latent) - paths) / NOISE).square().sum(dim=(1, 2)) / 2
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
        loss = (misfit + divergence).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    for number, value in enumerate(train()[0], start=1):
        print(f"iteration {number}  negative evidence bound {value:.3f}")
