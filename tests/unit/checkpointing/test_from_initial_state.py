"""Schedules that use the initial state without a checkpoint of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pnode_dist.checkpointing.from_initial_state import actions, tiers, traffic, without_tape
from pnode_dist.checkpointing.schedule import Action, Adjoint, Advance, EndForward, Record, Restart, Restore, Tier
from tests.oracles.checkpointing import fewest_steps


def steps_run(schedule: list[Action]) -> int:
    return sum(
        action.last - action.first if isinstance(action, Advance) else isinstance(action, Record) for action in schedule
    )


@given(steps=st.integers(1, 60), ram=st.integers(0, 6), disk=st.integers(0, 6))
def test_it_takes_as_few_steps_as_with_one_checkpoint_more_and_moves_what_it_says(
    steps: int, ram: int, disk: int
) -> None:
    places = tiers(steps, ram, disk)
    schedule = list(actions(steps, places))
    assert places.count(Tier.RAM) <= ram
    assert places.count(Tier.DISK) <= disk
    assert steps_run(schedule) == fewest_steps(steps, min(ram + disk + 1, max(steps - 1, 1)))
    stored = [action for action in schedule if isinstance(action, Advance) and action.checkpoint]
    restored = [action for action in schedule if isinstance(action, Restore)]
    assert all(action.first for action in stored)
    assert all(action.step for action in restored)
    written = sum(action.checkpoint is Tier.DISK for action in stored)
    read = sum(action.tier is Tier.DISK for action in restored)
    assert traffic(steps, places) == ((written, read), len(stored) - written + len(restored) - read)


@given(steps=st.integers(1, 40), slots=st.integers(0, 5))
def test_without_recording_nothing_is_recorded_before_the_forward_pass_ends(steps: int, slots: int) -> None:
    schedule = list(without_tape(actions(steps + 1, tiers(steps + 1, slots, 0)), steps))
    forward, backward = schedule[: schedule.index(EndForward())], schedule[schedule.index(EndForward()) :]
    assert all(isinstance(action, Advance) for action in forward)
    assert steps_run(forward) == steps
    assert [action.step for action in backward if isinstance(action, Adjoint)] == list(reversed(range(steps)))
    assert [action.step for action in backward if isinstance(action, Record)] == list(reversed(range(steps)))
    assert steps_run(schedule) == fewest_steps(steps + 1, min(slots + 1, steps)) - 1
    assert any(isinstance(action, Restart) for action in backward)
