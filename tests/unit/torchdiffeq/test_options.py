"""Each option of torchdiffeq has torchdiffeq's effect, or is refused in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq

from pnode_dist import ConfigurationError
from pnode_dist.errors import StepSizeError
from pnode_dist.torchdiffeq import odeint
from tests.oracles.right_hand_sides import Network, distance, random
from tests.unit.torchdiffeq.recorded import Recorded

SPAN = torch.tensor([0.0, 6.0], dtype=torch.float64)
U0 = random(2, 3)


def largest(y: torch.Tensor) -> torch.Tensor:
    return y.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.01},
        {"first_step": 3.0},
        {"safety": 0.6},
        {"ifactor": 1.5, "first_step": 0.001},
        {"dfactor": 0.7, "first_step": 3.0},
        {"max_step": 0.05},
        {"min_step": 0.4},
        {"norm": largest},
        {"step_t": torch.tensor([0.61, 1.3], dtype=torch.float64)},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("decreasing", [False, True])
def test_an_option_leads_to_the_steps_of_torchdiffeq(options: dict[str, Any], decreasing: bool) -> None:
    t = SPAN.flip(0) if decreasing else SPAN
    until = 1.3 if "step_t" in options else 4.0
    if "step_t" in options:
        # From the last such time on, to see the steps before it alone.
        t = torch.tensor([1.4, 0.0] if decreasing else [0.0, 1.4], dtype=torch.float64)
    ours, theirs, plain = Recorded(), Recorded(), Recorded()
    found = odeint(ours, U0, t, method="dopri5", options=options)
    exact = torchdiffeq.odeint(theirs, U0, t, method="dopri5", options=options)
    odeint(plain, U0, t)
    if "step_t" in options:
        assert {0.61, 1.3} <= {time for time, _ in ours.accepted}
        assert not {0.61, 1.3} & {time for time, _ in plain.accepted}
        assert distance(found[-1], exact[-1]) < 1e-6
        return
    taken, wanted, without = (
        [h for time, h in f.taken if abs(time - t[0].item()) < until] for f in (ours, theirs, plain)
    )
    assert len(wanted) > 2
    both = min(len(taken), len(wanted))
    torch.testing.assert_close(torch.tensor(taken[:both]), torch.tensor(wanted[:both]), rtol=1e-6, atol=0)
    assert len(taken) + len(wanted) <= 2 * both + 1
    assert taken != without


def test_the_number_of_steps_between_outputs_is_limited() -> None:
    odeint(Network(), U0, SPAN, method="dopri5", options={"max_num_steps": 100})
    with pytest.raises(StepSizeError, match=r"max_num_steps = 3: more steps .* are needed at t = 0\.\d+$"):
        odeint(Network(), U0, SPAN, method="dopri5", options={"max_num_steps": 3})


class Jumping(torch.nn.Module):
    """A rate that jumps at 0.7 and 1.3, and may not be evaluated there."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        self.times: list[float] = []

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.times.append(t.item())
        return self.rates[torch.bucketize(t.detach(), torch.tensor([0.7, 1.3], dtype=torch.float64))] * y


@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
@pytest.mark.parametrize("decreasing", [False, True])
def test_a_jump_of_f_costs_no_accuracy_where_jump_t_names_it(method: str, decreasing: bool) -> None:
    t = torch.tensor([0.0, 0.5, 0.7, 1.0, 2.0], dtype=torch.float64)
    growth = torch.tensor([0.0, 0.5, 0.7, 0.7 - 2 * 0.3, 0.7 - 2 * 0.6 + 0.5 * 0.7], dtype=torch.float64)
    if decreasing:
        t, growth = t.flip(0), growth.flip(0) - growth[-1]
    jumping, u0 = Jumping(), torch.ones(1, dtype=torch.float64)
    options = {"jump_t": torch.tensor([1.3, 0.7, 9.0], dtype=torch.float64)}
    found = odeint(jumping, u0, t, method=method, options=options, rtol=1e-9, atol=1e-11)
    assert distance(found[:, 0], torch.exp(growth)) < 1e-8
    assert {0.7, 1.3}.isdisjoint(jumping.times)
    found[-1].sum().backward()
    lengths = torch.tensor([0.7, 0.6, 0.7], dtype=torch.float64) * (-1 if decreasing else 1)
    assert distance(jumping.rates.grad, lengths * torch.exp(growth[-1])) < 1e-8


@pytest.mark.parametrize("method", ["euler", "heun2", "rk4"])
@pytest.mark.parametrize("decreasing", [False, True])
def test_perturbed_steps_and_their_gradients_are_those_of_torchdiffeq(method: str, decreasing: bool) -> None:
    t = torch.tensor([0.0, 0.35, 0.7, 1.3], dtype=torch.float64)
    grid = torch.tensor([0.0, 0.3, 0.7, 1.0, 1.3], dtype=torch.float64)
    if decreasing:
        t, grid = t.flip(0), grid.flip(0)

    def solved(solver: Callable[..., Any], perturb: bool) -> tuple[Jumping, torch.Tensor]:
        options = {"perturb": perturb, "grid_constructor": lambda func, y0, t: grid}
        jumping = Jumping()
        y = solver(jumping, torch.ones(1, dtype=torch.float64), t, method=method, options=options)
        y.square().sum().backward()
        return jumping, y.detach()

    (ours, found), (theirs, wanted), (_, plain) = (
        solved(solver, perturb) for solver, perturb in ((odeint, True), (torchdiffeq.odeint, True), (odeint, False))
    )
    assert distance(found, wanted) < 1e-13
    assert distance(ours.rates.grad, theirs.rates.grad) < 1e-13
    # Euler's method evaluates at the starts of steps alone. The rate at a jump is that before it.
    assert (distance(found, plain) > 1e-2) == (method != "euler" or not decreasing)
    assert {0.7, 1.3}.isdisjoint(ours.times)


def wave(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.cos(3 * t) * y


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_the_gradient_in_t_of_perturbed_steps_is_that_of_torchdiffeq(method: str) -> None:
    found, wanted = (torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    for solver, t in ((odeint, found), (torchdiffeq.odeint, wanted)):
        y = solver(wave, torch.ones(1, dtype=torch.float64), t, method=method, options={"perturb": True})
        y[-1].sum().backward()
    assert distance(found.grad, wanted.grad) < 1e-12


def test_a_jump_at_a_time_of_t_keeps_the_gradient_in_t() -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    options = {"jump_t": torch.tensor([0.5], dtype=torch.float64)}
    odeint(wave, torch.ones(1, dtype=torch.float64), t, rtol=1e-9, atol=1e-11, options=options)[-1].sum().backward()
    # The exact solution is exp((sin(3 t) - sin(3 t[0])) / 3).
    growth = torch.exp(torch.sin(torch.tensor(3.0, dtype=torch.float64)) / 3)
    exact = growth * torch.stack([-torch.cos(3 * t[0]), 0 * t[1], torch.cos(3 * t[2])]).detach()
    assert distance(t.grad, exact) < 1e-6


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dopri5", {"step_size": 0.1}, "'step_size': the steps of 'dopri5' follow from rtol and atol"),
        ("dopri5", {"interp": "cubic"}, "nothing is interpolated"),
        ("dopri5", {"perturb": True}, "use jump_t"),
        ("dopri5", {"max_stp": 1.0}, r"'max_stp' \(did you mean 'max_step'\?\): must be one of safety"),
        ("dopri5", {"max_order": 4}, "is for Adams methods"),
        ("dopri5", {"dtype": torch.float32}, "dtype = torch.float32: must be torch.float64"),
        ("dopri5", {"safety": 1.5}, r"safety = 1.5: must be in \(0, 1\]"),
        ("dopri5", {"ifactor": 0.5}, "ifactor = 0.5: must be at least 1"),
        ("dopri5", {"dfactor": 2}, r"dfactor = 2.0: must be in \(0, 1\)"),
        ("dopri5", {"min_step": 2, "max_step": 1}, "min_step = 2.0: must be between 0 and max_step"),
        ("dopri5", {"max_step": 0.0}, "max_step = 0.0: must be positive"),
        ("dopri5", {"first_step": -0.1}, "first_step = -0.1: must be positive"),
        ("dopri5", {"max_num_steps": 0}, "max_num_steps = 0: must be at least 1"),
        ("dopri5", {"max_num_steps": math.inf}, "max_num_steps = inf: must be at least 1, and a whole number"),
        ("dopri5", {"max_num_steps": 2.5}, "max_num_steps = 2.5: must be at least 1, and a whole number"),
        ("dopri5", {"norm": "rms"}, "norm = 'rms': must be a function"),
        ("dopri5", {"step_t": 0.3}, "step_t = 0.3: must be a one-dimensional tensor"),
        ("dopri5", {"step_t": [0.3], "jump_t": [0.3]}, "a time is repeated"),
        ("dopri5", ["safety"], "must be a dictionary"),
        ("rk4", {"first_step": 0.1}, "'first_step': must be one of step_size, grid_constructor, interp, perturb"),
        ("rk4", {"jump_t": [0.3]}, "use 'dopri5', or solve from jump to jump"),
        ("rk4", {"step_t": [0.3]}, "put such times into the grid"),
        ("rk4", {"norm": largest}, "without an error to measure"),
        ("rk4", {"perturb": 1}, "perturb = 1: must be True or False"),
        ("rk4", {"perturb": True, "interp": "cubic"}, "interp = 'cubic': must be 'linear' with perturb"),
        ("rk4", {"interp": "quintic"}, "interp = 'quintic': must be 'linear' or 'cubic'"),
        ("rk4", {"step_size": 0}, "step_size = 0: must be positive"),
        ("rk4", {"step_size": "fine"}, "step_size = 'fine': must be a number"),
        ("rk4", {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}, "exclude each other"),
        ("rk4", {"grid_constructor": 3}, "grid_constructor = 3: must be a function"),
        (
            "rk4",
            {"grid_constructor": lambda f, y, t: t[:-1]},
            r"must return times from t\[0\] = 0 to t\[-1\] = 6, got 0",
        ),
        ("rk4", {"grid_constructor": lambda f, y, t: [0.0, 6.0]}, "must return a one-dimensional tensor"),
        ("rk4", {"grid_constructor": lambda f, y, t: t[[0, 1, 0, 1]]}, "increase or decrease strictly"),
        ("trbdf2", {"max_iters": 3}, "Newton's method ends at its tolerance"),
    ],
)
def test_a_wrong_option_is_one_line_with_what_is_allowed(method: str, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        odeint(Network(), U0, SPAN, method=method, options=options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("options")
    assert "{" not in str(caught.value) or method == "trbdf2"
