"""Find the gravity and the restitution of a bouncing ball from the measured times of its bounces.

The solve goes from bounce to bounce. Written for torchdiffeq: its import line alone is changed.
"""

from __future__ import annotations

import torch
from torch import nn

from pnode_dist.torchdiffeq import odeint, odeint_event

BOUNCES = 3


class Ball(nn.Module):
    """A ball above a floor. The state is a tuple of height and speed, each `[1]`."""

    def __init__(self, gravity: float, restitution: float) -> None:
        super().__init__()
        self.gravity = nn.Parameter(torch.tensor([gravity], dtype=torch.float64))
        self.restitution = nn.Parameter(torch.tensor([restitution], dtype=torch.float64))

    def forward(self, t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return the rates of height and speed."""
        return state[1], -self.gravity

    def bounces(self) -> torch.Tensor:
        """Return the times of the first bounces from the height 2, `[BOUNCES]`."""
        time = torch.zeros(1, dtype=torch.float64)
        state = torch.full((1,), 2.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        times = []
        for _ in range(BOUNCES):
            time, states = odeint_event(self, state, time, event_fn=height, odeint_interface=odeint)
            times.append(time.reshape(()))
            # A little above the floor, where the next solve begins with a sign.
            state = states[0][-1] + 1e-7, -self.restitution * states[1][-1]
        return torch.stack(times)


def height(t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the height, which is zero at a bounce."""
    return state[0]


def train(iterations: int = 5) -> tuple[list[float], nn.Module]:
    """Return the loss of each iteration, and the ball with the constants found."""
    torch.manual_seed(0)
    with torch.no_grad():
        times = Ball(9.81, 0.8).bounces()
    measured = times + 1e-3 * torch.randn_like(times)
    ball = Ball(9.0, 0.7)
    rates = [{"params": [ball.gravity], "lr": 0.6}, {"params": [ball.restitution], "lr": 0.03}]
    optimiser = torch.optim.Adam(rates)
    losses = []
    for _ in range(iterations):
        optimiser.zero_grad()
        loss = (ball.bounces() - measured).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, ball


if __name__ == "__main__":
    found, model = train(40)
    constants = {name: round(value.item(), 3) for name, value in model.named_parameters()}
    print(f"loss {found[0]:.6f} -> {found[-1]:.6f}, {constants}")
