"""Solves with events: their times, states and gradients are those of plain torch and of closed forms."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import Trajectory
from pnode_dist.errors import ConfigurationError, EventError, RecomputationError
from pnode_dist.hybrid.event import Event, EventSolution
from pnode_dist.hybrid.event_solve import solve_events
from tests.oracles.events import PlainEvent, PlainSolution, solve_plain
from tests.oracles.right_hand_sides import Network, distance, random
from tests.oracles.runge_kutta import TABLEAUX

FLOAT64 = torch.float64
GRAVITY, RESTITUTION, HEIGHT = 9.81, 0.8, 2.0


class Ball(nn.Module):
    """A ball that falls on a floor and bounces: parameters are gravity and restitution."""

    def __init__(self) -> None:
        super().__init__()
        self.gravity = nn.Parameter(torch.tensor(GRAVITY, dtype=FLOAT64))
        self.restitution = nn.Parameter(torch.tensor(RESTITUTION, dtype=FLOAT64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.stack([u[1], -self.gravity])

    def bounced(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros_like(u[0]), -self.restitution * u[1]])

    def floor(self, **changes: Any) -> Event:
        return Event(lambda t, u: u[0], direction=-1, reset=self.bounced, name="floor", **changes)

    def times(self, height: torch.Tensor, count: int) -> torch.Tensor:
        """The times of the first bounces in closed form."""
        time = (2 * height / self.gravity).sqrt()
        speed, found = self.gravity * time, [time]
        for _ in range(count - 1):
            speed = self.restitution * speed
            found.append(found[-1] + 2 * speed / self.gravity)
        return torch.stack(found)


def gradients(loss: torch.Tensor, *wanted: torch.Tensor) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rk4", "step_size": 0.05},
        {"rtol": 1e-8},
        pytest.param({"method": "cn", "step_size": 0.05}, marks=pytest.mark.nightly),
        pytest.param({"method": "arkimex_3", "step_size": 0.1}, marks=pytest.mark.nightly),
        pytest.param({"method": "dirk_es213sal", "rtol": 1e-8}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_five_bounces_and_their_gradients_are_those_of_the_closed_form(settings: dict[str, Any]) -> None:
    ball, height = Ball(), torch.tensor(HEIGHT, dtype=FLOAT64, requires_grad=True)
    u0 = torch.stack([height, torch.zeros((), dtype=FLOAT64)])
    solution = solve_events(ball, u0, [0.0, 2.0, 8.0], ball.floor(terminal=5), **settings)
    wanted = ball.times(height, 5)
    assert solution.which == (0,) * 5
    assert distance(solution.event_times, wanted) < 1e-13
    weights = random(5)
    inputs = (ball.gravity, ball.restitution, height)
    found, exact = (gradients((weights * times).sum(), *inputs) for times in (solution.event_times, wanted))
    assert max(abs(a - b).item() for a, b in zip(found, exact, strict=True)) < 1e-10
    assert solution.t.tolist() == [0.0, 2.0]
    assert solution.t_end.item() == solution.event_times[-1].item()


class Switching(nn.Module):
    """A network whose events have parameters of their own in `g` and `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()
        self.level = nn.Parameter(torch.tensor(0.35, dtype=FLOAT64))
        self.kick = nn.Parameter(random(3, seed=5) * 0.3)
        self.rate = nn.Parameter(torch.tensor(0.6, dtype=FLOAT64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        turned = torch.stack([-u[..., 1], u[..., 0], 0 * u[..., 2]], dim=-1)
        found: torch.Tensor = self.network(t, u) * 0.3 + 6.0 * turned
        return found

    def g(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u[..., 0].sum() - self.level * torch.cos(t)

    def second(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u[..., 1].sum() + self.rate * t - 0.2

    def reset(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor([0.0, 0.1, 1.0], dtype=u.dtype)
        return u * (1 + weights * torch.sin(t)) + weights * self.kick


TIMES = [0.0, 0.37, 1.1, 2.0]


def both(
    system: Switching, times: list[float], table: str, method: str, directions: tuple[int, int], **settings: Any
) -> tuple[EventSolution, PlainSolution, list[list[torch.Tensor]]]:
    """The solution, that of plain torch, and the gradients of both with respect to state, times and parameters."""
    u0 = random(2, 3, seed=3).requires_grad_()
    t = torch.tensor(times, dtype=FLOAT64, requires_grad=True)
    events = [
        Event(system.g, direction=directions[0], reset=system.reset),
        Event(system.second, direction=directions[1]),
    ]
    plain = [
        PlainEvent(system.g, directions[0], system.reset),
        PlainEvent(system.second, directions[1]),
    ]
    solution = solve_events(system, u0, t, events, method=method, step_size=0.11, **settings)
    wanted = solve_plain(system, u0, t, plain, TABLEAUX[table], 0.11)
    ours = (solution.u, solution.event_times, solution.u_before, solution.u_after, solution.u_end)
    found = []
    for each in (ours, wanted.all()):
        loss = sum((random(*part.shape, seed=9) * part).sum() for part in each)
        assert isinstance(loss, torch.Tensor)
        found.append(gradients(loss, u0, t, *system.parameters()))
    assert distance(ours, wanted.all()) < 1e-12
    return solution, wanted, found


@pytest.mark.parametrize(
    ("table", "method", "times", "directions"),
    [
        ("4", "rk4", TIMES, (0, 0)),
        ("3bs", "bosh3", TIMES, (1, -1)),
        ("5dp", "dopri5", TIMES[::-1], (-1, 0)),
        pytest.param("1fe", "euler", TIMES, (0, 1), marks=pytest.mark.nightly),
        pytest.param("6vr", "verner6", TIMES[::-1], (0, 0), marks=pytest.mark.nightly),
    ],
)
def test_times_states_and_all_gradients_are_those_of_plain_torch(
    table: str, method: str, times: list[float], directions: tuple[int, int]
) -> None:
    solution, wanted, (found, expected) = both(Switching(), times, table, method, directions)
    assert list(solution.which) == wanted.which
    assert set(wanted.which) == {0, 1}
    assert len(wanted.which) >= 3
    assert distance(found, expected) < 1e-12
