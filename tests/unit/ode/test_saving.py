"""`save` and `on_output`: which outputs a solve has, and who takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pnode_dist import NeuralODE, Saved, Trajectory, odeint
from pnode_dist.errors import ConfigurationError
from tests.oracles.right_hand_sides import Network, distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.0, 0.35, 1.0]
U0, FUNC = random(2, 3), Network()
FIXED: dict[str, Any] = {"method": "rk4", "step_size": 0.1}
STEPS = [*(k * 0.35 / 4 for k in range(4)), *(0.35 + k * 0.65 / 7 for k in range(8))]
SAVED = {
    "steps": STEPS,
    5: [STEPS[0], STEPS[5], STEPS[10]],
    ("times", 5): [STEPS[0], STEPS[4], STEPS[5], STEPS[10], STEPS[11]],
    ("last", 5): [STEPS[0], STEPS[5], STEPS[10], STEPS[11]],
    ("times", "last"): TIMES,
}


@pytest.mark.parametrize("save", SAVED, ids=str)
def test_the_outputs_of_fixed_steps_are_at_the_times_that_were_asked_for(save: Any) -> None:
    found = odeint(FUNC, U0, TIMES, save=save, **FIXED)
    assert isinstance(found, Saved)
    assert found.t.tolist() == pytest.approx(SAVED[save], rel=1e-14)
    wanted = odeint_plain(FUNC, U0, STEPS, TABLEAUX["4"], 1.0)
    assert distance(found.u, wanted[[STEPS.index(time) for time in SAVED[save]]]) <= 1e-13


@pytest.mark.parametrize("budget", [None, Trajectory(keep="solution", ram_slots=2)], ids=["graphs", "checkpoints"])
@pytest.mark.parametrize("save", ["steps", 3, ("last", 3)], ids=str)
def test_saved_steps_have_the_gradient_of_plain_torch(save: Any, budget: Trajectory | None) -> None:
    u0 = U0.clone().requires_grad_()
    found = odeint(FUNC, u0, TIMES, save=save, trajectory=budget, **FIXED)
    numbers = [min(range(12), key=lambda k, t=t: abs(STEPS[k] - t)) for t in found.t.tolist()]
    plain = odeint_plain(FUNC, u0, STEPS, TABLEAUX["4"], 1.0)[numbers]
    inputs = [u0, *FUNC.parameters()]
    found, wanted = (torch.autograd.grad(states.sin().sum(), inputs) for states in (found.u, plain))
    assert distance(found, wanted) <= 1e-12


def test_times_of_saved_steps_follow_the_output_times() -> None:
    t = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    saved = odeint(FUNC, U0, t, save="steps", **FIXED)
    (found,) = torch.autograd.grad(saved.t[2] + 10 * saved.t[-1] + saved.t[6], t)
    assert found.tolist() == pytest.approx([0.5, 0.5 + 5 / 7, 10 + 2 / 7], rel=1e-12)


@pytest.mark.parametrize("method", ["dopri5", "cn", "arkimex_3"])
def test_all_accepted_steps_are_saved_with_their_times(method: str) -> None:
    node = NeuralODE(FUNC, method=method, rtol=1e-4, save="steps")
    t = torch.tensor(TIMES, dtype=torch.float64)
    u0 = U0.clone().requires_grad_()
    saved = node(u0, t)
    assert len(saved.t) == node.last_solve.forward_steps + 1 == len(saved.u)
    at_times = odeint(FUNC, u0, t, method=method, rtol=1e-4)
    places = [(saved.t - time).abs().argmin().item() for time in t]
    assert torch.equal(saved.t[places], t)
    assert torch.equal(saved.u[places], at_times)
    found = torch.autograd.grad(saved.u[places].sin().sum(), u0)
    wanted = torch.autograd.grad(at_times.sin().sum(), u0)
    assert distance(found, wanted) <= 1e-13


def test_a_consumer_takes_the_outputs_while_the_solve_goes_on() -> None:
    taken: list[tuple[float, torch.Tensor]] = []

    def take(t: float, u: torch.Tensor) -> None:
        taken.append((t, u))
        u.add_(0)  # Its own tensor, to be written into.

    for method in ("rk4", "cn"):
        taken.clear()
        with torch.no_grad():
            assert odeint(FUNC, U0, TIMES, method=method, step_size=0.1, on_output=take) is None
            wanted = odeint(FUNC, U0, TIMES, method=method, step_size=0.1)
        assert [time for time, _ in taken] == TIMES
        assert torch.equal(torch.stack([u for _, u in taken]), wanted)


def test_a_consumer_takes_observations_of_steps_with_error_control() -> None:
    taken: list[tuple[float, Any]] = []
    settings: dict[str, Any] = {"rtol": 1e-4, "save": "steps", "observe": lambda t, u: {"sum": u.sum()}}
    with torch.no_grad():
        odeint(FUNC, U0, TIMES, on_output=lambda t, u: taken.append((t, u)), **settings)
        saved = odeint(FUNC, U0, TIMES, **settings)
    assert [time for time, _ in taken] == pytest.approx(saved.t.tolist(), rel=1e-15)
    assert [u["sum"].item() for _, u in taken] == saved.u["sum"].tolist()


def test_a_consumer_that_raises_ends_the_solve() -> None:
    def full(t: float, u: torch.Tensor) -> None:
        raise OSError("no space left")

    node = NeuralODE(FUNC, on_output=full, **FIXED)
    with torch.no_grad(), pytest.raises(OSError, match="no space left"):
        node(U0, TIMES)
    node.on_output = None
    assert distance(node(U0, TIMES), odeint_plain(FUNC, U0, TIMES, TABLEAUX["4"], 0.1)) <= 1e-13


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"save": "step"}, "save = 'step': must be 'times', 'last', 'steps', a number n"),
        ({"save": 0}, "save = 0: must be"),
        ({"save": True}, "save = True: must be"),
        ({"save": ()}, r"save = \(\): must be"),
        ({"save": 1.5}, "save = 1.5: must be"),
        ({"save": ("steps", 3)}, "must name one number of steps at most"),
        ({"last_only": True, "save": "steps"}, "last_only = True and save = 'steps': must be one of them"),
        ({"on_output": print}, "on_output: the outputs are not kept, so there is no gradient"),
    ],
)
def test_outputs_that_cannot_be_had_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        odeint(FUNC, U0, TIMES, **FIXED, **settings)
