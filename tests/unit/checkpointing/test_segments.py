"""Plans whose schedule acts on segments of several steps, of which the last may be shorter."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pnode_dist import ConfigurationError, Trajectory
from pnode_dist.checkpointing.budget import Slots
from pnode_dist.checkpointing.plan import Plan, best, check_plan, needs_costs
from pnode_dist.checkpointing.replay import run_backward, run_forward
from pnode_dist.checkpointing.schedule import Tier
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.checkpointing.store import Checkpoints, MemoryPool
from pnode_dist.checkpointing.store import State as FlatState
from tests.oracles.checkpointing import fewest_solve_steps_within

SIZE = 0.03


def planned(ram: int, steps: int, segment: int, tape: int = 5, keep: str = "auto", **given: str) -> Plan:
    """With checkpoints of one byte."""
    slots = Slots(min(ram, steps - 1), 0, 1, ram)
    return best(Trajectory(ram=ram, keep=keep, **given), slots, steps, tape, None, segment).chosen  # type: ignore[arg-type]


@given(steps=st.integers(1, 90), segment=st.integers(1, 12), ram=st.integers(0, 150), tape=st.integers(1, 9))
def test_the_plan_of_full_segments_is_the_published_optimum_of_so_many_units(
    steps: int, segment: int, ram: int, tape: int
) -> None:
    units = math.ceil(steps / segment)
    plan = planned(ram, units * segment, segment, tape)
    assert plan.units == units
    optimum = fewest_solve_steps_within(ram, units, 1, plan.segment * tape, most_tapes=units)
    assert plan.forward_steps == plan.segment * optimum
    # A shorter last segment saves its missing steps in each of its runs: in the forward pass, and without its tape in
    # the backward pass.
    shorter = planned(ram, steps, segment, tape)
    if steps >= segment:
        saved = units * segment - steps
        assert plan.forward_steps - shorter.forward_steps == saved * (1 if plan.kept else 2)
        assert shorter.kept_steps == (plan.kept * segment - saved if plan.kept else 0)


def test_a_segment_longer_than_the_solve_is_the_solve() -> None:
    plan = planned(100, 7, 1000)
    assert (plan.segment, plan.units, plan.kept_steps, plan.recomputed_steps) == (7, 1, 7, 0)
    assert plan.ram_bytes == 7 * 5


def test_a_segment_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="segment = 0: must be at least 1"):
        planned(100, 7, 0)


def test_a_plan_for_other_segments_is_refused_in_one_line() -> None:
    plan, slots = planned(20, 20, 4), Slots(19, 0, 1, 20)
    check_plan(plan, 20, slots, 4)
    with pytest.raises(ConfigurationError, match=r"is for segments of 4 steps, not of 1$"):
        check_plan(plan, 20, slots)
    check_plan(planned(20, 3, 4), 3, Slots(2, 0, 1, 20), 4)


def test_all_needs_one_state_for_each_segment_but_the_first() -> None:
    assert planned(4, 20, 4, schedule="all").forward_steps == 2 * 20
    with pytest.raises(ConfigurationError, match="the states of 5 segments need ram = 4, more than 3"):
        planned(3, 20, 4, schedule="all")


def test_the_disk_is_needed_only_if_the_states_before_the_segments_do_not_fit() -> None:
    budget, slots = Trajectory(ram=4, disk=9, keep="solution"), Slots(4, 9, 1, 4)
    assert needs_costs(budget, slots, 20, 5)
    assert not needs_costs(budget, slots, 20, 5, segment=4)


class Segments:
    """Euler steps of du/dt = sin u, in segments. Implements `replay.Steps`."""

    def __init__(self, u0: FlatState, steps: int, segment: int) -> None:
        self.u0, self.lengths = u0, [min(segment, steps - first) for first in range(0, steps, segment)]
        self.state, self.segment = u0.copy(), segment
        self.tapes: dict[int, list[FlatState]] = {}
        self.adjoint_state = np.ones_like(u0)
        self.most_tapes = 0

    def time(self, step: int) -> float:
        return SIZE * self.segment * step

    def count(self, step: int) -> int:
        return self.lengths[step]

    def overwrite(self, write: Callable[[FlatState], None]) -> None:
        write(self.state)

    def restart(self) -> None:
        self.state = self.u0.copy()

    def advance(self, step: int, recompute: bool = False) -> None:
        for _ in range(self.lengths[step]):
            self.state = self.state + SIZE * np.sin(self.state)

    def record(self, step: int, recompute: bool = False) -> None:
        self.tapes[step] = []
        for _ in range(self.lengths[step]):
            self.tapes[step].append(self.state)
            self.state = self.state + SIZE * np.sin(self.state)
        self.most_tapes = max(self.most_tapes, len(self.tapes))

    def adjoint(self, step: int) -> None:
        for state in reversed(self.tapes.pop(step)):
            self.adjoint_state = self.adjoint_state * (1 + SIZE * np.cos(state))


@pytest.mark.parametrize("ram", [0, 2, 11, 40, 1000])
@pytest.mark.parametrize("segment", [1, 3, 7, 50])
def test_a_gradient_through_segments_is_that_of_plain_torch_from_any_budget(segment: int, ram: int) -> None:
    steps, u0 = 50, np.array([0.3, -1.2, 2.0])
    plan = planned(ram, steps, segment)
    solve, statistics = Segments(u0, steps, segment), SolveStatistics()
    checkpoints = Checkpoints({Tier.RAM: MemoryPool(3, np.dtype(float))}, 1, statistics)
    actions = plan.actions()
    run_forward(actions, solve, checkpoints, statistics, lambda unit: None)
    assert len(solve.tapes) == plan.kept
    assert statistics.checkpoint_bytes_peak <= plan.ram
    lost = run_backward(actions, solve, checkpoints, statistics, lambda unit: None, lambda error: False, plan.ram)
    assert not lost
    assert statistics.forward_steps + statistics.recomputed_steps == plan.forward_steps
    assert statistics.adjoint_steps == steps
    assert solve.most_tapes == max(plan.kept, 1)
    start = torch.tensor(u0, requires_grad=True)
    state = start
    for _ in range(steps):
        state = state + SIZE * torch.sin(state)
    (wanted,) = torch.autograd.grad(state.sum(), [start])
    np.testing.assert_allclose(solve.adjoint_state, wanted.numpy(), rtol=1e-13)
