"""Schedules that weigh accesses of the disk: legal, as cheap as they say, and as cheap as an independent program's."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnode_dist.checkpointing.binomial import disk_traffic, optimal_forward_steps
from pnode_dist.checkpointing.hierarchical import HierarchicalSchedule, hierarchical, is_affordable
from pnode_dist.checkpointing.schedule import Advance, Restore, Tier, with_last_recorded
from tests.oracles.checkpointing import ModelExecutor

COSTS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 30.0])


def counted(schedule: HierarchicalSchedule) -> tuple[int, int, int]:
    """Forward steps, writes and reads of the disk, by running it on a model that refuses illegal moves."""
    actions = list(schedule.actions())
    run = ModelExecutor(schedule.steps, {"ram": schedule.ram_slots, "disk": schedule.disk_slots}).run(
        with_last_recorded(iter(actions), schedule.steps, schedule.steps)
    )
    assert run.reversed == list(range(schedule.steps - 1, -1, -1))
    writes = sum(isinstance(action, Advance) and action.checkpoint is Tier.DISK for action in actions)
    reads = sum(isinstance(action, Restore) and action.tier is Tier.DISK for action in actions)
    return run.forward_steps + run.recomputed_steps, writes, reads


@settings(deadline=None, max_examples=200)
@given(steps=st.integers(1, 120), ram=st.integers(0, 6), disk=st.integers(0, 6), write=COSTS, read=COSTS)
def test_a_schedule_is_legal_and_costs_what_it_says(steps: int, ram: int, disk: int, write: float, read: float) -> None:
    if ram + disk == 0:
        ram = 1
    schedule = hierarchical(steps, ram, disk, write, read)
    forward_steps, writes, reads = counted(schedule)
    assert (forward_steps, writes, reads) == (schedule.forward_steps, schedule.disk_writes, schedule.disk_reads)
    assert forward_steps + writes * write + reads * read == pytest.approx(schedule.cost)


@cache
def cheapest(steps: int, ram: int, disk: int, write: float, read: float) -> float:
    """The least cost of schedules that hold no checkpoint on disk beyond one in memory, by plain recursion."""

    @cache
    def in_memory(length: int, slots: int) -> float:
        if length == 1:
            return 1
        if slots == 0:
            return float("inf")
        return min(j + in_memory(length - j, slots - 1) + in_memory(j, slots) for j in range(1, length))

    @cache
    def at_hand(length: int, free: int) -> float:
        options = [in_memory(length, ram)]
        if free:
            options += [write + j + at_hand(length - j, free - 1) + on_disk(j, free - 1) for j in range(1, length)]
        return min(options)

    @cache
    def on_disk(length: int, free: int) -> float:
        """To reverse what follows a state on disk, reading it first."""
        again = [j + at_hand(length - j, free) + on_disk(j, free) for j in range(1, length)]
        return read + min([in_memory(length, ram), *again])

    return at_hand(steps, disk)


@pytest.mark.parametrize(("write", "read"), [(0.0, 0.0), (0.5, 0.5), (2.0, 1.0), (0.1, 4.0)])
@pytest.mark.parametrize(("ram", "disk"), [(1, 1), (2, 2), (0, 3), (3, 1)])
def test_the_dynamic_program_finds_what_plain_recursion_finds(ram: int, disk: int, write: float, read: float) -> None:
    for steps in (1, 2, 3, 7, 12, 20, 27):
        assert hierarchical(steps, ram, disk, write, read).cost == pytest.approx(
            cheapest(steps, ram, disk, write, read)
        )


@pytest.mark.parametrize(
    ("steps", "ram", "disk", "write", "read"),
    [(53, 4, 3, 2.0, 2.0), (75, 1, 4, 1.0, 0.5), (38, 5, 5, 4.0, 0.1), (64, 2, 2, 0.5, 0.1), (30, 3, 5, 2.0, 1.0)],
)
def test_the_cost_is_that_of_checkpoint_schedules(steps: int, ram: int, disk: int, write: float, read: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import checkpoint_schedules as cs

        cost = 0.0
        for action in cs.HRevolve(steps, ram, disk, wd=write, rd=read):
            if isinstance(action, cs.Forward):
                cost += action.n1 - action.n0 + write * (action.write_ics and action.storage == cs.StorageType.DISK)
            elif isinstance(action, cs.Copy | cs.Move):
                cost += read * (action.from_storage == cs.StorageType.DISK)
            elif isinstance(action, cs.EndReverse):
                break
    assert hierarchical(steps, ram, disk, write, read).cost == pytest.approx(cost)


def test_a_dear_disk_is_touched_less_than_by_multistage_for_hardly_more_steps() -> None:
    schedule = hierarchical(1000, 4, 4, 5.0, 5.0)
    writes, reads = disk_traffic(1000, 4, 4)
    assert schedule.disk_writes + schedule.disk_reads < (writes + reads) / 2
    assert schedule.forward_steps < 1.02 * optimal_forward_steps(1000, 8)


def test_a_disk_that_costs_too_much_is_not_used() -> None:
    schedule = hierarchical(100, 3, 5, 1e6, 1e6)
    assert (schedule.disk_writes, schedule.disk_reads) == (0, 0)
    assert schedule.forward_steps == optimal_forward_steps(100, 3)


def test_thousands_of_steps_are_affordable_and_tens_of_thousands_are_not() -> None:
    assert is_affordable(2000, 50)
    assert not is_affordable(20_000, 50)


def test_no_slot_is_no_schedule() -> None:
    with pytest.raises(ValueError, match="no schedule for 5 steps"):
        hierarchical(5, 0, 0, 1.0, 1.0)
