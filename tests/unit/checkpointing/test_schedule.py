"""Schedules are legal, optimal and in the right order, for any number of steps and slots."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnode_dist.checkpointing.binomial import multistage
from pnode_dist.checkpointing.schedule import with_last_recorded
from tests.oracles.checkpointing import ModelExecutor, fewest_steps


def executed(steps: int, ram: int, disk: int) -> ModelExecutor:
    return ModelExecutor(steps, {"ram": ram, "disk": disk}).run(
        with_last_recorded(multistage(steps, ram, disk), steps, steps)
    )


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 150), st.integers(0, 12), st.integers(0, 12))
def test_a_schedule_is_legal_and_runs_the_fewest_steps_possible(steps: int, ram: int, disk: int) -> None:
    if ram + disk == 0:
        ram = 1
    run = executed(steps, ram, disk)
    assert run.reversed == list(range(steps - 1, -1, -1))
    assert run.forward_steps == steps
    assert run.forward_steps + run.recomputed_steps == fewest_steps(steps, ram + disk)


@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("ram", range(4))
@pytest.mark.parametrize("disk", range(4))
def test_every_small_schedule_is_legal_and_runs_the_fewest_steps_possible(steps: int, ram: int, disk: int) -> None:
    if ram + disk == 0 and steps > 1:
        with pytest.raises(ValueError, match="no schedule for"):
            multistage(steps, ram, disk)
        return
    run = executed(steps, ram, disk)
    assert run.reversed == list(range(steps - 1, -1, -1))
    assert run.forward_steps + run.recomputed_steps == fewest_steps(steps, ram + disk)


@pytest.mark.parametrize(("steps", "ram", "disk"), [(2049, 3, 4), (3000, 10, 0), (2500, 0, 5), (2200, 2200, 0)])
def test_a_long_schedule_is_legal_and_runs_the_fewest_steps_possible(steps: int, ram: int, disk: int) -> None:
    run = executed(steps, ram, disk)
    assert run.reversed == list(range(steps - 1, -1, -1))
    assert run.forward_steps + run.recomputed_steps == fewest_steps(steps, ram + disk)


def test_more_slots_than_steps_change_nothing() -> None:
    assert executed(10, 1000, 1000).recomputed_steps == executed(10, 9, 0).recomputed_steps == 9


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_no_schedule(steps: int) -> None:
    with pytest.raises(ValueError, match="no schedule for"):
        multistage(steps, 3, 3)


def test_two_schedules_of_one_shape_run_independently() -> None:
    first, second = multistage(20, 2, 1), multistage(20, 2, 1)
    head = [next(first) for _ in range(5)]
    assert list(second) == head + list(first)


def test_memory_is_used_before_disk() -> None:
    assert executed(100, 5, 5).most_held["ram"] == 5
    assert executed(6, 5, 5).most_held == {"ram": 5, "disk": 0}
