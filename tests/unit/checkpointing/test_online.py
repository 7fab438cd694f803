"""Checkpoints placed while steps go by: within the slots, and close to what is best with hindsight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnode_dist.checkpointing.binomial import reversal_steps
from pnode_dist.checkpointing.online import OnlineCheckpoints, OnlinePlacement
from pnode_dist.checkpointing.schedule import Adjoint, Advance, Record, Restart, Restore, StartBackward, Tier
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.checkpointing.store import Checkpoints, MemoryPool
from tests.oracles.checkpointing import fewest_steps
from tests.oracles.effort import lines_executed


@pytest.mark.parametrize("slots", [0, 1, 2, 4, 7, 12, 31])
def test_the_steps_in_all_are_at_most_four_thirds_of_the_optimum_and_one(slots: int) -> None:
    placement = OnlinePlacement(slots)
    held = [0]
    for step in range(1, 120 if slots == 0 else 1500):
        keep, given_up = placement.before(step)
        if given_up is not None:
            held.remove(given_up)
        if keep:
            held.append(step)
        assert len(held) <= slots + 1
        assert held[0] == 0
        steps = step + 1
        in_all = steps + reversal_steps(held, steps, slots + 1)
        assert in_all - 1 <= 4 / 3 * fewest_steps(steps, slots + 1), (steps, held)


def test_while_slots_are_free_every_state_is_kept() -> None:
    placement = OnlinePlacement(7)
    assert [placement.before(step) for step in range(1, 8)] == [(True, None)] * 7


def test_without_a_slot_nothing_is_kept_but_the_initial_state() -> None:
    placement = OnlinePlacement(0)
    assert [placement.before(step) for step in range(1, 4)] == [(False, None)] * 3


def test_placing_a_step_takes_few_lines_of_python_however_many_there_are() -> None:
    placement, steps = OnlinePlacement(64), 100_000
    assert lines_executed(lambda: [placement.before(step) for step in range(1, steps)]) < 20 * steps


class DiskLike(MemoryPool):
    """Slots in memory that count as disk."""

    on_disk = True


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(1, 90), ram=st.integers(0, 6), disk=st.integers(0, 6))
def test_a_solve_is_reversed_in_order_from_the_states_that_were_kept(steps: int, ram: int, disk: int) -> None:
    pools = {Tier.RAM: MemoryPool(1, np.dtype(float)), Tier.DISK: DiskLike(1, np.dtype(float))}
    checkpoints = Checkpoints(pools, 8, SolveStatistics())
    online = OnlineCheckpoints(checkpoints, ram, disk)
    state = np.zeros(1)
    for step in range(steps):
        state[:] = step
        online.before(step, float(step), state)
        tiers = list(checkpoints.held().values())
        assert tiers.count(Tier.RAM) <= ram
        assert tiers.count(Tier.DISK) <= disk
    current, expected = -1, steps - 1
    actions = online.reversal(steps, recorded=False)
    # Whoever loses a checkpoint before the first step is reversed has to know how many there are.
    assert next(actions) == StartBackward(steps)
    for action in actions:
        match action:
            case Restore(step, _, discard):
                assert step > 0
                checkpoints.restore(step, state, discard)
                assert state[0] == step
                current = step
            case Advance(first, last, tier):
                assert current == first
                if tier is not None:
                    state[:] = first
                    checkpoints.store(first, tier, state, float(first))
                    tiers = list(checkpoints.held().values())
                    assert tiers.count(Tier.RAM) <= ram
                    assert tiers.count(Tier.DISK) <= disk
                current = last
            case Restart():
                current = 0
            case Record(step):
                assert current == step == expected
            case Adjoint(step):
                assert step == expected
                expected -= 1
    assert expected == -1
    assert not checkpoints.held()
