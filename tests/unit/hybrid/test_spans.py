"""Batches of samples with times of their own, against plain torch that solves one sample after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, NeuralODE, SplitFunction, Trajectory, odeint, odeint_spans
from tests.oracles.implicit import CRANK_NICOLSON, odeint_implicit
from tests.oracles.right_hand_sides import Network, distance, random

TIMES = torch.tensor([[0.0, 0.3, 1.0], [0.5, 1.4, 1.5], [1.0, 0.4, -0.2], [0.2, 0.6, 0.6]], dtype=torch.float64)
STEP = 0.25
COUNTS = [4, 3]
"""The steps of the longest sample in each interval: 0.9 / 0.25 and 0.7 / 0.25."""
TIGHT = {"snes_rtol": 1e-13, "snes_stol": 1e-15, "ksp_rtol": 1e-13}


class Clocked(nn.Module):
    """A network of samples that their times drive."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        when = t.reshape(-1, 1) if t.dim() else t
        return self.network(when, u) + torch.sin(3 * when) * u


def one_by_one(f: nn.Module, u0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The states `[n, batch, ...]` by rk4 of each sample alone, in plain torch."""
    found = []
    for u, row in zip(u0, t, strict=True):
        states = [u]
        for number, count in enumerate(COUNTS):
            h = (row[number + 1] - row[number]) / count
            for step in range(count):
                at = row[number] + step * h
                a = f(at, u)
                b = f(at + h / 2, u + h / 2 * a)
                c = f(at + h / 2, u + h / 2 * b)
                u = u + h / 6 * (a + 2 * b + 2 * c + f(at + h, u + h * c))
            states.append(u)
        found.append(torch.stack(states))
    return torch.stack(found, 1)


def gradients(states: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(states.sin().sum(), inputs)


@pytest.mark.parametrize("keep", ["solution", "stages", "graph"])
def test_states_and_gradients_are_those_of_each_sample_alone(keep: str) -> None:
    f, u0, t = Clocked(), random(4, 3).requires_grad_(), TIMES.clone().requires_grad_()
    inputs = [u0, t, *f.parameters()]
    found = odeint_spans(f, u0, t, step_size=STEP, trajectory=Trajectory(ram="1MiB", keep=keep))
    wanted = one_by_one(f, u0, t)
    assert found.shape == (3, 4, 3)
    assert distance(found, wanted) < 1e-12
    assert distance(gradients(found, inputs), gradients(wanted, inputs)) < 1e-12


def test_equal_times_are_one_solve_of_the_batch() -> None:
    f, u0 = Clocked(), random(4, 3)
    found = odeint_spans(f, u0, TIMES[:1].expand(4, 3), step_size=STEP)
    assert distance(found, odeint(f, u0, TIMES[0], step_size=STEP)) < 1e-13


@pytest.mark.parametrize("newton", ["petsc", "batch"])
def test_implicit_steps_are_those_of_each_sample_alone(newton: str) -> None:
    f, u0 = Clocked(), random(4, 3).requires_grad_()
    inputs = [u0, *f.parameters()]
    settings: dict[str, Any] = {"newton": newton, **({"options": TIGHT} if newton == "petsc" else {})}
    found = odeint_spans(f, u0, TIMES[:, :2], method="cn", **settings)
    wanted = torch.stack(
        [odeint_implicit(f, u[None], row, CRANK_NICOLSON)[:, 0] for u, row in zip(u0, TIMES[:, :2], strict=True)], 1
    )
    assert distance(found, wanted) < 1e-11
    assert distance(gradients(found, inputs), gradients(wanted, inputs)) < 1e-10


def test_error_control_is_that_of_the_whole_batch() -> None:
    f, u0, t = Clocked(), random(4, 3), TIMES.clone().requires_grad_()
    found = odeint_spans(f, u0, t, rtol=1e-11, atol=1e-12, step_size=0.01)
    wanted = torch.stack([odeint(f, u, row, rtol=1e-12, atol=1e-13) for u, row in zip(u0[:3], t[:3], strict=True)], 1)
    assert distance(found[:, :3], wanted) < 1e-9
    (own,) = torch.autograd.grad(found[:, :3].sin().sum(), t)
    (expected,) = torch.autograd.grad(wanted.sin().sum(), t)
    assert distance(own, expected) < 1e-8


def test_a_padded_row_repeats_its_last_state() -> None:
    found = odeint_spans(Clocked(), random(4, 3), TIMES, step_size=STEP)
    assert torch.equal(found[2, 3], found[1, 3])
    assert not torch.equal(found[2, 2], found[1, 2])


def test_complex_and_split_states_have_times_of_their_own_too() -> None:
    t = TIMES[:2]
    u0 = (torch.ones(2, 1, dtype=torch.complex128), torch.ones(2, dtype=torch.float64))
    wave, decay = odeint_spans(
        lambda t, u: (1j * t.reshape(-1, 1) * u[0], -u[1]), u0, t, step_size=0.01, method="dopri5"
    )
    wanted = torch.exp(1j * (t**2 - t[:, :1] ** 2) / 2).T.unsqueeze(-1)
    assert distance(wave, wanted) < 1e-10
    assert distance(decay, torch.exp(t[:, :1] - t).T) < 1e-10
    split = SplitFunction(implicit=lambda t, u: -u, explicit=lambda t, u: torch.cos(t).reshape(-1, 1) * u)
    found = odeint_spans(split, torch.ones(2, 1, dtype=torch.float64), t, step_size=0.01, method="arkimex_3")
    exact = torch.exp(torch.sin(t) - torch.sin(t[:, :1]) - t + t[:, :1]).T.unsqueeze(-1)
    assert distance(found, exact) < 1e-6


def test_a_module_of_single_precision_gets_times_of_its_type() -> None:
    seen = []

    def f(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        seen.append((t.dtype, t.shape))
        return -u

    found = odeint_spans(f, torch.ones(4, 2), TIMES.float(), step_size=STEP)
    assert found.dtype == torch.float32
    assert set(seen) == {(torch.float32, (4,))}


def test_one_time_of_each_sample_returns_the_initial_state() -> None:
    u0 = random(4, 3)
    assert torch.equal(odeint_spans(Clocked(), u0, TIMES[:, :1]), u0[None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": TIMES[:3]}, r"t: shape \(3, 3\) for a state of 4 samples: must be \[batch, n\]"),
        ({"t": TIMES[0]}, r"t: shape \(3,\)"),
        ({"t": TIMES[:, [0, 2, 1]]}, r"t\[0\] = \[0.0, 1.0, 0.3\]: must increase or decrease"),
        ({"jumps": [0.5]}, "jumps: samples meet them in different steps"),
        ({"u0": torch.tensor(1.0)}, "u0: must be tensors whose first axis is the batch"),
        ({"u0": torch.ones(4), "method": "cn", "mass": torch.eye(4)}, "mass: must act on each sample alone"),
    ],
)
def test_other_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        odeint_spans(Clocked(), **{"u0": random(4, 3), "t": TIMES, "step_size": STEP, **change})


def test_odeint_names_the_function_for_times_of_each_sample() -> None:
    with pytest.raises(ValueError, match="odeint_spans takes times for each sample"):
        NeuralODE(Clocked())(random(4, 3), TIMES)
