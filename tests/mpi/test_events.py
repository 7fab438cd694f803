"""A solve with events on a partitioned state is that of the whole, gradients included, at any number of ranks."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from pnode_dist import BatchPartition, GridPartition, Mesh, Trajectory
from pnode_dist.errors import DisagreementError, EventError
from pnode_dist.hybrid.event import Event
from pnode_dist.hybrid.event_solve import solve_events
from pnode_dist.torchdiffeq import odeint_event
from tests.mpi.test_odeint import Flow, here
from tests.oracles.events import PlainEvent, solve_plain
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX

pytestmark = pytest.mark.mpi

SHAPE, TIMES, STEP_SIZE = (7, 9), [0.0, 0.3, 0.7, 1.2], 0.1
POINT, JUMP = (5, 7, 1), 0.45


class Pulses(nn.Module):
    """Parameters of an event and of its reset, which pushes the state on in the direction of the event."""

    def __init__(self, direction: int) -> None:
        super().__init__()
        self.direction = direction
        self.level = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.kick = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def reset(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u * (1 + 0.05 * torch.cos(t)) + self.direction * self.kick


def value(kind: str, whole: torch.Tensor) -> torch.Tensor:
    """The reduced quantity of an event, from the whole field."""
    if kind == "sum":
        return whole.mean()
    if kind == "point":
        return whole[POINT]
    return whole.max() if kind == "max" else whole.min()


def event_of(kind: str, pulses: Pulses, partition: GridPartition, level: float) -> Event:
    """The event of `value` at the level, from this rank's part."""
    (y0, y1), (x0, x1) = partition.owned
    size = partition.comm.size

    def g(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        offset = pulses.level * level
        if kind == "sum":
            return u.sum() / (SHAPE[0] * SHAPE[1] * 2) - offset / size
        if kind == "point":
            y, x, channel = POINT
            holds = y0 <= y < y1 and x0 <= x < x1
            return u[y - y0, x - x0, channel] - offset if holds else torch.zeros((), dtype=u.dtype)
        return (u.max() if kind == "max" else u.min()) - offset

    return Event(g, pulses.direction, reset=pulses.reset, over="sum" if kind in ("sum", "point") else kind)


@pytest.mark.parametrize(
    "kind", ["sum", "point", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("max", "min"))]
)
def test_events_over_ranks_are_those_of_the_whole_with_their_gradients(kind: str, mesh: Mesh) -> None:
    partition = GridPartition(mesh, shape=SHAPE, channels=2, boundary=("replicate", "periodic"))
    flow = Flow(partition)
    whole = random(*SHAPE, 2).requires_grad_()
    with torch.no_grad():
        start = value(kind, whole)
        ahead = solve_plain(flow.whole, whole, torch.tensor(TIMES, dtype=torch.float64), [], TABLEAUX["4"], STEP_SIZE)
        change = (value(kind, ahead.end) - start).item()
    level, direction = 2 * (start.item() + 0.4 * change), 1 if change > 0 else -1
    pulses = Pulses(direction)
    part = here(whole, partition).clone().requires_grad_()
    t = torch.tensor(TIMES, dtype=torch.float64)
    budget = Trajectory(ram="64KiB")
    solution = solve_events(
        flow,
        part,
        t,
        event_of(kind, pulses, partition, level),
        partition=partition,
        step_size=STEP_SIZE,
        trajectory=budget,
        jumps=[JUMP],
        observe=lambda t, u: (u, flow(t, u)),
    )
    wanted = solve_plain(
        flow.whole,
        whole,
        t,
        [PlainEvent(lambda t, u: value(kind, u) - pulses.level * level, direction, pulses.reset)],
        TABLEAUX["4"],
        STEP_SIZE,
        {JUMP: flow.whole},
    )
    outputs, times, before, after, end = wanted.all()
    slopes = torch.stack([flow.whole(time, state) for time, state in zip(t, outputs, strict=True)])
    assert len(solution.which) == len(wanted.which) > 0
    assert distance(solution.event_times, times) < 1e-12
    states, observed = solution.u
    fields = (
        (states, outputs),
        (observed, slopes),
        (solution.u_before, before),
        (solution.u_after, after),
        (solution.u_end, end),
    )
    for found, expected in fields:
        assert distance(found, here(expected, partition)) < 1e-12
    weights = [random(*expected.shape, seed=4) for _, expected in fields]
    of_times = random(len(times), seed=6)
    # Only one rank's loss depends on the times of the events.
    loss = sum((here(w, partition) * found).sum() for w, (found, _) in zip(weights, fields, strict=True))
    if mesh.rank == mesh.size - 1:
        loss = loss + (of_times * solution.event_times).sum()
    expected_loss = sum((w * expected).sum() for w, (_, expected) in zip(weights, fields, strict=True))
    expected_loss = expected_loss + (of_times * times).sum()
    parameters = [*flow.parameters(), *pulses.parameters()]
    found_gradients = torch.autograd.grad(loss, [part, *parameters], allow_unused=True)
    wanted_gradients = torch.autograd.grad(expected_loss, [whole, *parameters])
    assert distance(found_gradients[0], here(wanted_gradients[0], partition)) < 1e-12
    for mine, expected in zip(found_gradients[1:], wanted_gradients[1:], strict=True):
        assert distance(mesh.sum(torch.zeros_like(expected) if mine is None else mine), expected) < 1e-12


def test_an_event_that_must_be_equal_on_all_ranks_is_refused_where_it_differs(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, 2 * mesh.size, (3,))
    u0 = torch.full((2, 3), 1.0 + mesh.rank, dtype=torch.float64)
    event = Event(lambda t, u: u.sum() - 5.0, over="same", name="total")
    with (
        pytest.raises(DisagreementError, match="event 'total': over = 'same', but g differs")
        if mesh.size > 1
        else (nullcontext())
    ):
        solve_events(lambda t, u: -u, u0, [0.0, 1.0], event, partition=partition, step_size=0.1)


def test_an_error_in_the_event_of_one_rank_is_raised_on_all_of_them(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, 2 * mesh.size, (3,))
    last = mesh.rank == mesh.size - 1

    def g(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if last and t > 0.5:
            raise ZeroDivisionError("broken")
        return u.sum() + 100.0

    with pytest.raises(ZeroDivisionError if last else EventError, match="broken"):
        solve_events(lambda t, u: -u, torch.ones(2, 3), [0.0, 1.0], Event(g), partition=partition, step_size=0.1)


def test_different_events_on_the_ranks_are_refused_on_all_of_them(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, 2 * mesh.size, (3,))
    event = Event(lambda t, u: u.sum() + 100.0, direction=1 if mesh.rank == 0 else -1, name="total")
    with pytest.raises(DisagreementError, match="differ in events") if mesh.size > 1 else nullcontext():
        solve_events(lambda t, u: -u, torch.ones(2, 3), [0.0, 1.0], event, partition=partition, step_size=0.1)


def test_an_event_of_torchdiffeq_is_at_the_first_entry_of_all_ranks(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, 2 * mesh.size, (1,))
    rates = nn.Parameter(1 + torch.arange(2 * mesh.size, dtype=torch.float64)[:, None] / 10)
    first, last = partition.owned

    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rates = rates

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return -self.rates[first:last] * y

    u0, t0 = torch.ones(2, 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    arguments = {"rtol": 1e-11, "atol": 1e-12, "partition": partition}
    time, states = odeint_event(Decay(), u0, t0, event_fn=lambda t, y: y - 0.5, **arguments)
    fastest = rates.detach().max().item()
    assert time.item() == pytest.approx(math.log(2) / fastest, abs=1e-9)
    assert distance(states[1], torch.exp(-rates.detach()[first:last] * time.item())) < 1e-9
    # Each rank's copy of the time counts once.
    (found,) = torch.autograd.grad(time / mesh.size, rates)
    wanted = torch.zeros_like(found)
    wanted[-1] = -math.log(2) / fastest**2
    assert distance(mesh.sum(found), wanted) < 1e-8
