"""Windows of unequal times in one solve: each has its state at its own times."""

from __future__ import annotations

import pytest
import torch

from pnode_dist import odeint
from pnode_dist.problems.common.own_times import own_time, slopes

INTERVAL = 1.5
ELAPSED = torch.tensor([[0.0, 0.1, 1.6, 1.7], [0.0, 1.0, 1.5, 3.0], [0.0, 0.5, 1.0, 1.5]], dtype=torch.float64)


def at(tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    clock = torch.tensor(tau, dtype=torch.float64)
    return own_time(clock, ELAPSED, slopes(ELAPSED, INTERVAL), INTERVAL)


def test_the_clock_shows_each_window_its_own_times_at_the_outputs() -> None:
    for number in range(4):
        torch.testing.assert_close(at(number * INTERVAL)[0], ELAPSED[:, number], rtol=0, atol=1e-14)


def test_time_only_advances_and_its_rate_is_its_derivative() -> None:
    clock = torch.linspace(0, 3 * INTERVAL, 301, dtype=torch.float64)
    times = torch.stack([at(float(tau))[0] for tau in clock])
    rates = torch.stack([at(float(tau))[1] for tau in clock])
    assert (torch.diff(times, dim=0) > 0).all()
    differences = (times[2:] - times[:-2]) / (clock[2:] - clock[:-2]).unsqueeze(-1)
    # Between two outputs the time is a cubic; at one, its second derivative jumps.
    torch.testing.assert_close(rates[1:-1], differences, rtol=0, atol=0.02)


def test_equal_steps_are_a_clock_of_constant_rate() -> None:
    for tau in (0.0, 0.4, 2.2, 4.5):
        time, rate = at(tau)
        assert time[2].item() == pytest.approx(tau / 3, abs=1e-14)
        assert rate[2].item() == pytest.approx(1 / 3, abs=1e-14)


def test_one_solve_has_every_window_s_solution_at_its_own_times() -> None:
    def right_hand_side(tau: torch.Tensor, u: torch.Tensor, elapsed: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        time, rate = own_time(tau, elapsed, slope, INTERVAL)
        return (torch.cos(time) * rate).unsqueeze(-1) * u

    times = [number * INTERVAL for number in range(4)]
    start = torch.ones(3, 1, dtype=torch.float64)
    found = odeint(
        right_hand_side, start, times, method="rk4", step_size=0.02, args=(ELAPSED, slopes(ELAPSED, INTERVAL))
    )
    torch.testing.assert_close(found[..., 0], torch.exp(torch.sin(ELAPSED)).T, rtol=1e-8, atol=0)
