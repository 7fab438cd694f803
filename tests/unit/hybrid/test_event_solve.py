"""Solves with events: their times, states and gradients are those of plain torch and of closed forms."""

from __future__ import annotations

import math
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


class Pushed(Switching):
    """The network, with a push that changes at the jumps: `push` of the number of jumps that are passed."""

    def __init__(self, jumps: list[float]) -> None:
        super().__init__()
        self.jumps = jumps
        self.push = nn.Parameter(random(len(jumps) + 1, 3, seed=8))

    def piece(self, number: int) -> Any:
        return lambda t, u: super(Pushed, self).forward(t, u) + 2.0 * self.push[number] * (1 + t)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.piece(sum(bool(t > jump) for jump in self.jumps))(t, u)


@pytest.mark.parametrize(
    ("times", "moves"),
    [(TIMES, True), (TIMES[::-1], True), ([0.0, 0.37, 1.0, 2.0], False)],
    ids=["forward", "backward", "a jump at an output time"],
)
def test_jumps_of_func_between_events_have_the_gradients_of_plain_torch(times: list[float], moves: bool) -> None:
    jumps = [0.4, 1.0, 1.3]
    system, u0 = Pushed(jumps), random(2, 3, seed=3).requires_grad_()
    t = torch.tensor(times, dtype=FLOAT64, requires_grad=moves)
    event = Event(system.g, reset=system.reset)
    found = solve_events(system, u0, t, event, method="rk4", step_size=0.11, jumps=jumps)
    backward = times[-1] < times[0]
    # The piece after each jump, in the order of the solve.
    pieces = {jump: system.piece(number if backward else number + 1) for number, jump in enumerate(jumps)}
    first = system.piece(len(jumps) if backward else 0)
    wanted = solve_plain(first, u0, t, [PlainEvent(system.g, 0, system.reset)], TABLEAUX["4"], 0.11, pieces)
    assert len(wanted.times) >= 3
    assert any(low < time < high for time in found.event_times.tolist() for low, high in ((0.4, 1.0), (1.0, 1.3)))
    inputs = (u0, *((t,) if moves else ()), *system.parameters())
    ours = (found.u, found.event_times, found.u_before, found.u_after, found.u_end)
    assert distance(ours, wanted.all()) < 1e-12
    losses = (sum((random(*part.shape, seed=9) * part).sum() for part in each) for each in (ours, wanted.all()))
    ours_by, wanted_by = (gradients(loss, *inputs) for loss in losses)
    assert distance(ours_by, wanted_by) < 1e-12
    with torch.no_grad():
        again = solve_events(system, u0, t, event, method="rk4", step_size=0.11, jumps=jumps)
    assert distance((again.u,), (found.u.detach(),)) < 1e-14


def test_error_control_with_jumps_and_events_is_exact_for_the_pieces() -> None:
    # du/dt = 1 until 1, then 3, and a fall to 0 at 2: events at 4/3 and 2.
    solution = solve_events(
        lambda t, u: torch.where(t > 1.0, 3.0, 1.0) * torch.ones_like(u),
        torch.zeros(1, dtype=FLOAT64),
        [0.0, 2.5],
        Event(lambda t, u: u.sum() - 2.0, reset=lambda t, u: 0 * u),
        rtol=1e-9,
        jumps=[1.0],
    )
    assert solution.event_times.tolist() == pytest.approx([4 / 3, 2.0], abs=1e-14)
    assert solution.u_end.item() == pytest.approx(1.5, abs=1e-13)


class Seen(nn.Module):
    """An observation with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(3, 2, seed=4))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"seen": torch.sin(u @ self.weight) * (1 + t), "size": u.square().sum(dim=-1)}


@pytest.mark.parametrize("last", [False, True], ids=["at all times", "at the end"])
def test_observations_between_events_have_the_gradients_of_plain_torch(last: bool) -> None:
    system, seen, u0 = Switching(), Seen(), random(2, 3, seed=3).requires_grad_()
    t = torch.tensor(TIMES, dtype=FLOAT64, requires_grad=True)
    event, save = Event(system.g, reset=system.reset), "last" if last else "times"

    def solved() -> EventSolution:
        return solve_events(system, u0, t, event, method="rk4", step_size=0.11, observe=seen, save=save)

    found = solved()
    wanted = solve_plain(system, u0, t, [PlainEvent(system.g, 0, system.reset)], TABLEAUX["4"], 0.11)
    assert len(wanted.times) >= 2
    if last:
        plain = seen(t[-1], wanted.end)
    else:
        rows = [seen(time, state) for time, state in zip(t, wanted.outputs, strict=True)]
        plain = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert isinstance(found.u, dict)
    assert found.u.keys() == plain.keys()
    ours, theirs = ((*u.values(), end) for u, end in ((found.u, found.u_end), (plain, wanted.end)))
    assert distance(ours, theirs) < 1e-12
    inputs = (u0, t, *system.parameters(), *seen.parameters())
    losses = (sum((random(*part.shape, seed=9) * part).sum() for part in each) for each in (ours, theirs))
    ours_by, theirs_by = (gradients(loss, *inputs) for loss in losses)
    assert distance(ours_by, theirs_by) < 1e-12
    with torch.no_grad():
        again = solved()
    assert isinstance(again.u, dict)
    assert distance(tuple(again.u.values()), tuple(part.detach() for part in found.u.values())) < 1e-14


def test_an_observation_that_is_no_function_is_one_line() -> None:
    refused(TypeError, r"observe must be callable as observe\(t, u, \*args\), got int", observe=3)


def test_an_output_time_at_a_jump_has_no_gradient_with_events() -> None:
    refused(
        ValueError,
        r"t requires a gradient, and t\[1\] = 1 is one of jumps",
        jumps=[1.0],
        t=torch.tensor([0.0, 1.0, 2.0], requires_grad=True),
    )


@pytest.mark.parametrize(
    "trajectory",
    [Trajectory(keep="solution", ram_slots=2), Trajectory(keep="stages"), Trajectory(keep="graph")],
    ids=lambda trajectory: trajectory.keep,
)
def test_every_budget_gives_the_same_gradient(trajectory: Trajectory) -> None:
    _, _, (found, expected) = both(Switching(), TIMES, "4", "rk4", (0, 0), trajectory=trajectory)
    assert distance(found, expected) < 1e-12


def fall(**settings: Any) -> EventSolution:
    """A point that falls from 1 by 1 in a unit of time, with the event at zero."""
    given = {"t": [0.0, 0.4, 1.5, 2.0], "events": Event(lambda t, u: u[0], name="zero"), "step_size": 0.3, **settings}
    t, events = given.pop("t"), given.pop("events")
    return solve_events(lambda t, u: -torch.ones_like(u), torch.ones(1, dtype=FLOAT64), t, events, **given)


def test_the_outputs_are_those_up_to_the_terminal_event() -> None:
    solution = fall(events=Event(lambda t, u: u[0], terminal=True))
    assert solution.t.tolist() == [0.0, 0.4]
    assert distance(solution.u, torch.tensor([[1.0], [0.6]], dtype=FLOAT64)) < 1e-15
    assert (solution.t_end.item(), solution.which) == (pytest.approx(1.0, abs=1e-15), (0,))
    assert solution.u_end.shape == (1,)


def test_without_an_event_the_outputs_are_those_of_odeint_and_nothing_happened() -> None:
    solution = fall(events=Event(lambda t, u: u[0] + 5.0))
    assert solution.which == ()
    assert solution.event_times.shape == (0,)
    assert solution.u_before.shape == solution.u_after.shape == (0, 1)
    assert distance(solution.u[:, 0], 1 - torch.tensor([0.0, 0.4, 1.5, 2.0], dtype=FLOAT64)) < 1e-14


def test_a_solve_without_gradients_has_the_same_values_and_no_graph() -> None:
    system = Switching()
    u0, events = random(2, 3, seed=3), [Event(system.g, reset=system.reset), Event(system.second)]
    tracked = solve_events(system, u0, TIMES, events, rtol=1e-6)
    with torch.no_grad():
        plain = solve_events(system, u0, TIMES, events, rtol=1e-6)
    assert plain.which == tracked.which
    for name in ("u", "event_times", "u_before", "u_after", "t_end", "u_end"):
        found, wanted = getattr(plain, name), getattr(tracked, name)
        assert not found.requires_grad
        assert distance(found, wanted.detach()) < 1e-13


def test_the_state_at_the_end_alone_is_returned_with_last_only() -> None:
    solution = fall(last_only=True)
    assert solution.u.shape == (1,)
    assert torch.equal(solution.u, solution.u_end)


def test_an_event_at_an_output_time_has_the_state_before_its_reset_there() -> None:
    raised = Event(lambda t, u: t - 1.5, reset=lambda t, u: u + 7.0)
    solution = fall(events=raised)
    assert solution.event_times.tolist() == [1.5]
    assert distance(solution.u[:, 0], torch.tensor([1.0, 0.6, -0.5, 6.0], dtype=FLOAT64)) < 1e-14
    assert distance(solution.u_after, torch.tensor([[6.5]], dtype=FLOAT64)) < 1e-14


def test_a_g_that_is_zero_at_the_start_is_no_event_and_its_sign_follows_from_a_step() -> None:
    def wave(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.cos(t)])

    for times, wanted in (([0.0, 4.0], torch.pi), ([0.0, -4.0], -torch.pi)):
        t = torch.tensor(times, dtype=FLOAT64)
        u0 = torch.zeros(1, dtype=FLOAT64)
        solution = solve_events(wave, u0, t, Event(lambda t, u: u[0]), method="verner8", step_size=0.2)
        assert solution.event_times.tolist() == pytest.approx([wanted], abs=1e-9)


def test_events_at_one_time_happen_in_the_order_of_the_list() -> None:
    double = Event(lambda t, u: u[0], reset=lambda t, u: 2 * u + 4.0)
    shift = Event(lambda t, u: 3 * u[0], reset=lambda t, u: u + 1.0)
    for events, after in (([double, shift], [4.0, 5.0]), ([shift, double], [1.0, 6.0])):
        solution = fall(t=[0.0, 1.2], events=events)
        assert solution.which == (0, 1)
        assert solution.event_times.tolist() == pytest.approx([1.0, 1.0], abs=1e-15)
        assert solution.u_after[:, 0].tolist() == pytest.approx(after, abs=1e-14)


def test_two_events_in_one_step_are_found_in_their_order() -> None:
    late, early = (Event(lambda t, u, at=at: u[0] - at) for at in (0.2, 0.6))
    solution = fall(events=[late, early], t=[0.0, 2.0], step_size=None)
    assert solution.which == (1, 0)
    assert solution.event_times.tolist() == pytest.approx([0.4, 0.8], abs=1e-15)


def test_a_terminal_number_ends_the_solve_at_the_event_of_that_number() -> None:
    again = Event(lambda t, u: u[0] - 0.5, terminal=3, reset=lambda t, u: u + 0.25)
    solution = fall(events=again)
    assert solution.event_times.tolist() == pytest.approx([0.5, 0.75, 1.0], abs=1e-15)


def test_states_of_several_parts_keep_their_form_and_type() -> None:
    ball = Ball()
    event = Event(lambda t, u: u[0].sum(), direction=-1, terminal=2, reset=lambda t, u: (0 * u[0], -0.5 * u[1]))
    height, speed = torch.full((1,), HEIGHT), torch.zeros(1)
    solution = solve_events(
        lambda t, u: (u[1], -GRAVITY * torch.ones(1)), (height, speed), [0.0, 0.5, 3.0], event, step_size=0.05
    )
    assert [part.dtype for part in (*solution.u, *solution.u_after, *solution.u_end)] == [torch.float32] * 6
    assert [part.shape for part in solution.u_before] == [(2, 1), (2, 1)]
    with torch.no_grad():
        ball.restitution.fill_(0.5)
    wanted = ball.times(torch.tensor(HEIGHT, dtype=FLOAT64), 2).detach()
    assert distance(solution.event_times, wanted) < 1e-6


def test_extra_arguments_reach_func_g_and_reset() -> None:
    speed = torch.tensor(2.0, dtype=FLOAT64, requires_grad=True)
    event = Event(lambda t, u, a: u[0] - a / 4, reset=lambda t, u, a: u + a, terminal=True)
    solution = solve_events(
        lambda t, u, a: -a * torch.ones_like(u),
        torch.ones(1, dtype=FLOAT64),
        [0.0, 1.0],
        event,
        args=(speed,),
        step_size=0.1,
    )
    assert solution.u_end.item() == pytest.approx(2.5)
    (found,) = torch.autograd.grad(solution.event_times.sum() + solution.u_end.sum(), speed)
    # The time is 1/a - 1/4, and the state after the reset a/4 + a.
    assert found.item() == pytest.approx(-1 / 4 + 5 / 4)


def refused(kind: type[Exception], message: str, **settings: Any) -> None:
    with pytest.raises(kind, match=message) as caught:
        fall(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_ball_whose_bounces_accumulate_is_an_error_with_time_and_number() -> None:
    ball = Ball()
    with torch.no_grad():
        ball.restitution.fill_(0.4)
    limit = ball.times(torch.tensor(HEIGHT, dtype=FLOAT64), 100)[-1].item()
    u0 = torch.tensor([HEIGHT, 0.0], dtype=FLOAT64)
    with (
        torch.no_grad(),
        pytest.raises(EventError, match=r"event 'floor': happens again within .*accumulate") as caught,
    ):
        solve_events(ball, u0, [0.0, 10.0], ball.floor(), step_size=1.0)
    text = str(caught.value)
    assert float(text.split("at t = ")[1].split(",")[0]) == pytest.approx(limit, abs=1e-6)
    assert 10 < int(text.split("after ")[1].split()[0]) < 30


def test_more_events_than_allowed_are_an_error_with_the_time() -> None:
    again = Event(lambda t, u: u[0] - 0.5, reset=lambda t, u: u + 0.25, name="again")
    refused(EventError, "max_events = 2: more events are needed at t = 1.*'again'", events=again, max_events=2)


def test_two_events_that_set_off_one_another_at_once_are_an_error() -> None:
    def resetting(own: int) -> Event:
        def reset(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1e-17, 1.0] if own else [1.0, 1e-17], dtype=u.dtype)

        return Event(lambda t, u: u[own], reset=reset, name=f"zero of {own}")

    u0 = torch.tensor([0.35, 0.9], dtype=FLOAT64)
    with pytest.raises(
        EventError, match=r"event 'zero of 1': the last 16 of 16 events are within .* of t = 0\.35: .*chat"
    ):
        solve_events(lambda t, u: -torch.ones_like(u), u0, [0.0, 1.0], [resetting(0), resetting(1)], step_size=0.1)


def test_a_zero_without_a_derivative_in_time_is_an_error_with_a_gradient_alone() -> None:
    t = torch.tensor([0.0, 2.0], dtype=FLOAT64, requires_grad=True)
    stopped = Event(lambda t, u: torch.where(u[0] > 0.5, 1.0, -1.0), name="step")
    with pytest.raises(EventError, match=r"event 'step': dg/dt = 0 at t = 0\.5.*no derivative"):
        fall(t=t, events=stopped)
    assert fall(events=stopped).event_times.tolist() == pytest.approx([0.5], abs=1e-14)


def test_a_zero_that_is_hardly_crossed_is_reported_with_a_gradient_alone() -> None:
    t = torch.tensor([0.0, 2.0], dtype=FLOAT64, requires_grad=True)
    flat = Event(lambda t, u: (u[0] - 0.45) ** 5, name="flat")
    with pytest.warns(RuntimeWarning, match=r"event 'flat': dg/dt = -.* at t = 0\.5.* is nearly zero beside g = "):
        fall(t=t, events=flat)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fall(events=flat)


def test_the_tolerance_of_the_time_bounds_the_delay_of_the_event() -> None:
    curved, exact = Event(lambda t, u: torch.exp(u[0]) - 1.3), 1 - math.log(1.3)
    late = fall(events=curved, t=[0.0, 2.0], step_size=0.7, time_tolerance=0.05).event_times.item()
    assert exact + 1e-9 < late <= exact + 0.05


def test_a_func_with_another_value_each_time_has_no_gradient_with_events() -> None:
    weight = torch.ones(1, dtype=FLOAT64, requires_grad=True)
    with pytest.raises(RecomputationError, match="differ from those of the search for events"):
        solve_events(
            lambda t, u: -weight * (1 + 0.1 * torch.rand(1, dtype=FLOAT64)),
            torch.ones(1, dtype=FLOAT64),
            [0.0, 2.0],
            Event(lambda t, u: u[0]),
            step_size=0.1,
        )


def test_second_derivatives_of_the_time_of_an_event_are_refused() -> None:
    height = torch.tensor(HEIGHT, dtype=FLOAT64, requires_grad=True)
    ball = Ball()
    solution = solve_events(
        ball, torch.stack([height, 0 * height]), [0.0, 1.0], ball.floor(terminal=True), step_size=0.1
    )
    with pytest.raises(ConfigurationError, match="events: second derivatives of the time of an event"):
        torch.autograd.grad(solution.event_times.sum(), height, create_graph=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"events": []}, "events: must hold one event or more"),
        ({"events": [len]}, "events: must be of type pnode_dist.Event, got builtin_function_or_method"),
        (
            {"events": Event(lambda t, u: u.expand(4), name="many")},
            r"event 'many': g must return one real number, got s",
        ),
        (
            {"events": Event(lambda t, u: u[0], reset=lambda t, u: u[:0], name="r")},
            r"event 'r': reset returned float64 \[",
        ),
        ({"max_events": 0}, "max_events = 0: must be a positive number of events"),
        ({"time_tolerance": 0.0}, "time_tolerance = 0.0: must be a positive time"),
        ({"method": "bdf"}, "method = 'bdf': a step depends on those before it"),
        ({"step_size": -1.0}, "step_size = -1.0: must be positive"),
        ({"t": [0.0, 0.0]}, "t must increase or decrease strictly"),
        ({"save": "steps"}, "save = 'steps': must be 'times', because a solve with events needs all states"),
    ],
)
def test_a_wrong_argument_is_one_line(settings: dict[str, Any], message: str) -> None:
    refused(ValueError, message, **settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"g": 3}, "g = 3: must be a function"),
        ({"direction": 2}, "event 'g': direction = 2: must be -1, 0 or 1"),
        ({"terminal": -1}, "event 'g': terminal = -1: must be True, False, or a positive number"),
        ({"reset": 1}, "event 'g': reset = 1: must be a function"),
        ({"over": "mean"}, "event 'g': over = 'mean': must be one of sum, min, max, same"),
    ],
)
def test_a_wrong_field_of_an_event_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Event(**{"g": lambda t, u: u[0], "name": "g", **fields})


def test_a_g_that_is_nan_is_an_error() -> None:
    refused(EventError, "event 'nan': g is nan at t = 0", events=Event(lambda t, u: u[0] * float("nan"), name="nan"))


def test_transforms_of_torch_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="events: not available under torch's transforms"):
        torch.func.grad(lambda u: solve_events(lambda t, u: -u, u, [0.0, 1.0], Event(lambda t, u: u[0])).u_end.sum())(
            torch.ones(1)
        )


def test_a_complex_state_has_events_of_its_complex_value() -> None:
    rate = torch.tensor(2.0, dtype=FLOAT64, requires_grad=True)

    def turning(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 1j * rate * u

    quarter = Event(lambda t, u: u[0].real, direction=-1, terminal=2, reset=lambda t, u: -1j * u)
    u0 = torch.ones(1, dtype=torch.complex128)
    solution = solve_events(turning, u0, [0.0, 0.5, 2.0], quarter, method="verner8", step_size=0.1)
    # A quarter turn takes pi / (2 rate), and the reset undoes it.
    wanted = torch.tensor([0.25, 0.5], dtype=FLOAT64) * torch.pi
    assert distance(solution.event_times, wanted) < 1e-10
    assert distance(solution.u_before, torch.full((2, 1), 1j, dtype=torch.complex128)) < 1e-10
    assert distance(solution.u_after, torch.ones(2, 1, dtype=torch.complex128)) < 1e-10
    assert distance(solution.u[1], torch.exp(1j * torch.ones(1, dtype=FLOAT64))) < 1e-10
    (found,) = torch.autograd.grad(solution.event_times.sum(), rate)
    assert found.item() == pytest.approx(-wanted.sum().item() / 2, abs=1e-9)
    wrong = Event(lambda t, u: u[0].real, reset=lambda t, u: u.real)
    with pytest.raises(ConfigurationError, match="reset must return a state of the form of u0"):
        solve_events(turning, u0, [0.0, 2.0], wrong, method="verner8", step_size=0.1)
