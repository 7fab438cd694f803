"""Schedules that weigh accesses of the disk: legal, as cheap as they say, and as cheap as an independent program's."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnode_dist.checkpointing.binomial import traffic
from pnode_dist.checkpointing.hierarchical import HierarchicalSchedule, hierarchical, is_affordable
from pnode_dist.checkpointing.schedule import Advance, Restore, Tier, whole_solve
from tests.oracles.checkpointing import ModelExecutor, fewest_steps

COSTS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 30.0])


def counted(schedule: HierarchicalSchedule) -> tuple[int, int, int]:
    """Forward steps, writes and reads of the disk, by running it on a model that refuses illegal moves."""
    actions = list(schedule.actions())
    run = ModelExecutor(schedule.steps, {"ram": schedule.ram_slots, "disk": schedule.disk_slots}).run(
        whole_solve(actions, schedule.steps, 1)
    )
    assert run.reversed == list(range(schedule.steps - 1, -1, -1))
    writes = sum(isinstance(action, Advance) and action.checkpoint is Tier.DISK for action in actions)
    reads = sum(isinstance(action, Restore) and action.tier is Tier.DISK for action in actions)
    return run.forward_steps + run.recomputed_steps, writes, reads


@settings(deadline=None, max_examples=200)
@given(steps=st.integers(1, 120), ram=st.integers(0, 6), disk=st.integers(0, 6), write=COSTS, read=COSTS)
def test_a_schedule_is_legal_and_costs_what_it_says(steps: int, ram: int, disk: int, write: float, read: float) -> None:
    schedule = hierarchical(steps, ram, disk, write, read)
    forward_steps, writes, reads = counted(schedule)
    told = schedule.traffic
    assert (forward_steps, writes, reads) == (told.forward_steps, told.disk_writes, told.disk_reads)
    assert forward_steps + writes * write + reads * read == pytest.approx(schedule.cost)


@cache
def cheapest(steps: int, ram: int, disk: int, write: float, read: float) -> float:
    """The least cost of schedules that write nothing to disk beside a checkpoint in memory, by plain recursion."""

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

    @cache
    def initial(length: int) -> float:
        """To reverse the first steps from the initial state: in memory alone, or the later ones with the disk too."""
        later = [j + at_hand(length - j, disk) + initial(j) for j in range(1, length)]
        return min([in_memory(length, ram + 1), *later])

    return initial(steps)


@pytest.mark.parametrize(("write", "read"), [(0.0, 0.0), (0.5, 0.5), (2.0, 1.0), (0.1, 4.0)])
@pytest.mark.parametrize(("ram", "disk"), [(1, 1), (2, 2), (0, 3), (3, 1), (0, 0)])
def test_the_dynamic_program_finds_what_plain_recursion_finds(ram: int, disk: int, write: float, read: float) -> None:
    for steps in (1, 2, 3, 7, 12, 20, 27):
        assert hierarchical(steps, ram, disk, write, read).cost == pytest.approx(
            cheapest(steps, ram, disk, write, read)
        )


@pytest.mark.parametrize(
    ("steps", "ram", "disk", "write", "read"),
    [(53, 4, 3, 2.0, 2.0), (75, 1, 4, 1.0, 0.5), (38, 5, 5, 4.0, 0.1), (64, 2, 2, 0.5, 0.1), (30, 3, 5, 2.0, 1.0)],
)
def test_the_cost_beyond_the_first_checkpoint_is_that_of_checkpoint_schedules(
    steps: int, ram: int, disk: int, write: float, read: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import checkpoint_schedules as cs

        def published(steps: int, ram: int) -> float:
            """The cost of H-Revolve, which has to store the initial state."""
            cost = 0.0
            for action in cs.HRevolve(steps, ram, disk, wd=write, rd=read):
                if isinstance(action, cs.Forward):
                    cost += action.n1 - action.n0 + write * (action.write_ics and action.storage == cs.StorageType.DISK)
                elif isinstance(action, cs.Copy | cs.Move):
                    cost += read * (action.from_storage == cs.StorageType.DISK)
                elif isinstance(action, cs.EndReverse):
                    break
            return cost

        found = hierarchical(steps, ram, disk, write, read)

        # Advance to the first checkpoint, reverse from there as published, and reverse the steps before it.
        def from_initial(length: int) -> float:
            stretch = int(found.stretches[-1][length])
            if stretch == 0:
                return float(fewest_steps(length, ram + 1))
            return stretch + published(length - stretch, ram) + from_initial(stretch)

        assert found.cost == pytest.approx(from_initial(steps))
        assert published(steps, ram + 1) - 1e-9 <= found.cost <= published(steps, ram) + 1e-9


def test_a_dear_disk_is_touched_less_often_than_by_multistage_and_that_saves_time() -> None:
    schedule = hierarchical(1000, 4, 4, 5.0, 5.0)
    weighed, unweighed = schedule.traffic, traffic(1000, 4, 4)
    few, many = weighed.disk_writes + weighed.disk_reads, unweighed.disk_writes + unweighed.disk_reads
    assert few < many / 2
    assert unweighed.forward_steps == fewest_steps(1000, 9)
    assert 0 < weighed.forward_steps - unweighed.forward_steps < 5.0 * (many - few)


def test_a_disk_that_costs_too_much_is_not_used() -> None:
    schedule = hierarchical(100, 3, 5, 1e6, 1e6)
    assert (schedule.traffic.disk_writes, schedule.traffic.disk_reads) == (0, 0)
    assert schedule.traffic.forward_steps == fewest_steps(100, 4)


def test_thousands_of_steps_are_affordable_and_tens_of_thousands_are_not() -> None:
    assert is_affordable(2000, 50)
    assert not is_affordable(20_000, 50)


def test_no_step_is_no_schedule() -> None:
    with pytest.raises(ValueError, match="no schedule for 0 steps"):
        hierarchical(0, 1, 1, 1.0, 1.0)
