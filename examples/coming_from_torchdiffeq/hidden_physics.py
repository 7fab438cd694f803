"""Find the frequency and the damping of a driven pendulum, and its start, from measured angles.

The drive changes abruptly at one time, which `jump_t` names. Written for torchdiffeq: its import line alone is changed.
"""

from __future__ import annotations

import torch
from torch import nn

from pnode_dist.torchdiffeq import odeint

SWITCHED_OFF = 2.0


class Pendulum(nn.Module):
    """A damped pendulum with a drive until `SWITCHED_OFF`. The state is a tuple of angle and angular speed."""

    def __init__(self, stiffness: float, damping: float) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(stiffness, dtype=torch.float64))
        self.damping = nn.Parameter(torch.tensor(damping, dtype=torch.float64))

    def forward(self, t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return the rates of angle and angular speed, each `[1]`."""
        angle, speed = state
        drive = torch.where(t < SWITCHED_OFF, 0.5, 0.0)
        return speed, drive - self.stiffness * torch.sin(angle) - self.damping * speed


def train(iterations: int = 5) -> tuple[list[float], nn.Module]:
    """Return the loss of each iteration, and the pendulum with the constants found."""
    torch.manual_seed(0)
    times = torch.linspace(0.0, 5.0, 26, dtype=torch.float64)
    options = {"jump_t": torch.tensor([SWITCHED_OFF], dtype=torch.float64)}
    start = torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    with torch.no_grad():
        angles, _ = odeint(Pendulum(4.0, 0.3), start, times, method="dopri5", options=options)
    measured = angles + 0.01 * torch.randn_like(angles)
    pendulum = Pendulum(3.0, 0.1)
    first = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    optimiser = torch.optim.Adam([*pendulum.parameters(), first], lr=0.1)
    losses = []
    for _ in range(iterations):
        optimiser.zero_grad()
        angles, _ = odeint(pendulum, (first, start[1]), times, method="dopri5", options=options)
        loss = (angles - measured).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, pendulum


if __name__ == "__main__":
    found, model = train(40)
    constants = {name: round(value.item(), 3) for name, value in model.named_parameters()}
    print(f"loss {found[0]:.6f} -> {found[-1]:.6f}, {constants}")
