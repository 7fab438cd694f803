"""Solves up to an event have torchdiffeq's arguments, results and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import nn

from pnode_dist import torchdiffeq as here
from pnode_dist.errors import ConfigurationError, EventError
from tests.oracles.right_hand_sides import distance, random

FLOAT64 = torch.float64
TIGHT = {"rtol": 1e-11, "atol": 1e-12}


class Oscillator(nn.Module):
    """A damped oscillator with a threshold on its position."""

    def __init__(self) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(2.0, dtype=FLOAT64))
        self.damping = nn.Parameter(torch.tensor(0.1, dtype=FLOAT64))
        self.threshold = nn.Parameter(torch.tensor(-0.3, dtype=FLOAT64))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([y[1], -self.stiffness * y[0] - self.damping * y[1] + 0.1 * torch.sin(t)])

    def below(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y[0] - self.threshold + 0.05 * t


def found_by(solver: Callable[..., Any], **settings: Any) -> list[torch.Tensor]:
    """The time and state of the event, and the gradient of a function of both."""
    system = Oscillator()
    y0, t0 = (torch.tensor(x, dtype=FLOAT64, requires_grad=True) for x in ([1.0, 0.2], 0.3))
    time, states = solver(system, y0, t0, event_fn=system.below, **settings)
    loss = time.square() + (random(2, 2) * states).sum()
    parameters = [system.stiffness, system.damping]
    return [time.detach(), states.detach(), *torch.autograd.grad(loss, [y0, *parameters])]


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_time_states_and_gradients_are_those_of_torchdiffeq(adjoint: bool, reverse: bool) -> None:
    interface = here.odeint_adjoint if adjoint else here.odeint
    found = found_by(partial(here.odeint_event, odeint_interface=interface), reverse_time=reverse, **TIGHT)
    wanted = found_by(torchdiffeq.odeint_event, reverse_time=reverse, **TIGHT)
    assert distance(found, wanted) < 1e-8


def test_the_time_depends_on_parameters_of_the_event_as_finite_differences() -> None:
    system = Oscillator()
    y0, t0 = torch.tensor([1.0, 0.2], dtype=FLOAT64), torch.tensor(0.3, dtype=FLOAT64)

    def time() -> torch.Tensor:
        return here.odeint_event(system, y0, t0, event_fn=system.below, **TIGHT)[0]

    (found,) = torch.autograd.grad(time(), system.threshold)
    times = []
    with torch.no_grad():
        for change in (1e-5, -1e-5):
            system.threshold.fill_(-0.3 + change)
            times.append(time().item())
    assert found.item() == pytest.approx((times[0] - times[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("method", ["rk4", "trapezoid"])
def test_methods_with_given_steps_locate_the_event_on_the_step(method: str) -> None:
    options = {"step_size": 0.02}
    found = found_by(here.odeint_event, method=method, options=options)
    wanted = found_by(here.odeint_event, **TIGHT)
    assert distance(found, wanted) < (1e-6 if method == "rk4" else 1e-3)


def test_the_first_of_several_entries_to_change_its_sign_is_the_event() -> None:
    y0 = (torch.tensor([1.0], dtype=FLOAT64), torch.tensor([-2.0, 0.5], dtype=FLOAT64))

    def func(t: torch.Tensor, y: Any) -> Any:
        return -torch.ones_like(y[0]), torch.tensor([1.0, 0.0], dtype=FLOAT64)

    def entries(t: torch.Tensor, y: Any) -> torch.Tensor:
        return torch.cat([y[0] - 0.25, y[1]])

    time, states = here.odeint(func, y0, torch.tensor([0.0, 1.0], dtype=FLOAT64), event_fn=entries)
    assert time.item() == pytest.approx(0.75, abs=1e-12)
    assert [part.shape for part in states] == [(2, 1), (2, 2)]
    assert distance(states[1][1], torch.tensor([-1.25, 0.5], dtype=FLOAT64)) < 1e-12


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_func_is_evaluated_on_one_side_of_a_jump_before_the_event(sign: float) -> None:
    at = sign * torch.tensor([0.5, 2.0], dtype=FLOAT64)

    def func(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return sign * torch.where((sign * t < 0.5) | (sign * t > 2.0), 1.0, 3.0) * torch.ones_like(y)

    t = torch.tensor([0.0, sign], dtype=FLOAT64)
    options = {"jump_t": at, "step_t": sign * torch.tensor([0.2, 1.1])}
    time, states = here.odeint(
        func, torch.zeros(1, dtype=FLOAT64), t, event_fn=lambda t, y: y[0] - 6.0, options=options
    )
    # 0.5 at the first jump, 5 at the second one, and 6 a unit of time later.
    assert time.item() == pytest.approx(sign * 3.0, abs=1e-12)
    assert states[-1].item() == pytest.approx(6.0, abs=1e-12)


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"method": "euler", "options": {"step_size": 1.0}}, marks=pytest.mark.nightly)],
    ids=["adaptive", "given steps"],
)
def test_a_solve_without_an_event_ends_with_an_error(settings: dict[str, Any]) -> None:
    def func(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(y)

    arguments = (func, torch.ones(1), torch.tensor([0.0, 1.0]))
    with pytest.raises(EventError, match="event_fn: no event from t = 0 to "):
        here.odeint(*arguments, event_fn=lambda t, y: y, **settings)


def test_another_interface_whose_event_has_no_gradient_is_refused() -> None:
    arguments = (Oscillator(), torch.ones(2), torch.tensor(0.0))
    with pytest.raises(ConfigurationError, match=r"odeint_interface = .*: must be odeint or odeint_adjoint"):
        here.odeint_event(*arguments, event_fn=lambda t, y: y[0], odeint_interface=torchdiffeq.odeint)
    with pytest.raises(ConfigurationError, match=r"t0 = 0\.0: must be a tensor with one time"):
        here.odeint_event(Oscillator(), torch.ones(2), 0.0, event_fn=lambda t, y: y[0])
