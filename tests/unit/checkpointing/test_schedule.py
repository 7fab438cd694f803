"""Schedules are legal, optimal and in the right order, for any number of steps and slots."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnode_dist.checkpointing.binomial import multistage, traffic
from pnode_dist.checkpointing.schedule import Advance, Restore, counted, whole_solve
from tests.oracles.checkpointing import ModelExecutor, fewest_solve_steps


def executed(steps: int, ram: int, disk: int, tapes: int = 1) -> ModelExecutor:
    """A whole solve that keeps the tape of its last step, or none."""
    head = multistage(steps - tapes + 1, ram, disk)
    return ModelExecutor(steps, {"ram": ram, "disk": disk}).run(whole_solve(head, steps, tapes))


def assert_runs_the_fewest_steps(steps: int, ram: int, disk: int, tapes: int) -> None:
    run = executed(steps, ram, disk, tapes)
    assert run.reversed == list(range(steps - 1, -1, -1))
    assert run.forward_steps == steps
    assert run.forward_steps + run.recomputed_steps == fewest_solve_steps(steps, ram + disk, tapes)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 150), st.integers(0, 12), st.integers(0, 12), st.integers(0, 1))
def test_a_schedule_is_legal_and_runs_the_fewest_steps_possible(steps: int, ram: int, disk: int, tapes: int) -> None:
    assert_runs_the_fewest_steps(steps, ram, disk, tapes)


@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("ram", range(4))
@pytest.mark.parametrize("disk", range(4))
def test_every_small_schedule_is_legal_and_runs_the_fewest_steps_possible(steps: int, ram: int, disk: int) -> None:
    for tapes in (0, 1):
        assert_runs_the_fewest_steps(steps, ram, disk, tapes)


@pytest.mark.parametrize(("steps", "ram", "disk"), [(2049, 3, 4), (3000, 10, 0), (2500, 0, 5), (2200, 2200, 0)])
def test_a_long_schedule_is_legal_and_runs_the_fewest_steps_possible(steps: int, ram: int, disk: int) -> None:
    assert_runs_the_fewest_steps(steps, ram, disk, 1)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 100), st.integers(0, 6), st.integers(0, 6))
def test_the_initial_state_is_never_stored_and_the_traffic_is_that_predicted(steps: int, ram: int, disk: int) -> None:
    actions = list(multistage(steps, ram, disk))
    assert all(action.first for action in actions if isinstance(action, Advance) and action.checkpoint)
    assert all(action.step for action in actions if isinstance(action, Restore))
    assert traffic(steps, ram, disk) == counted(actions)


def test_more_slots_than_steps_change_nothing() -> None:
    assert executed(10, 1000, 1000).recomputed_steps == executed(10, 8, 0).recomputed_steps == 9


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
    assert executed(7, 5, 5).most_held == {"ram": 5, "disk": 0}
