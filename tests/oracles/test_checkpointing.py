"""The closed form of the optimum is the optimum, and the model executor refuses what it should."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest

from tests.oracles.checkpointing import (
    IllegalMoveError,
    ModelExecutor,
    fewest_solve_steps,
    fewest_solve_steps_by_search,
    fewest_steps,
    fewest_steps_by_recursion,
    fewest_steps_by_search,
)


class Tier(Enum):
    RAM = "ram"
    DISK = "disk"


@dataclass
class Advance:
    first: int
    last: int
    checkpoint: Tier | None


@dataclass
class Record:
    step: int


@dataclass
class EndForward:
    pass


@dataclass
class Restore:
    step: int
    tier: Tier
    discard: bool


@dataclass
class Adjoint:
    step: int


def two_steps() -> list[Any]:
    return [
        Advance(0, 1, Tier.RAM),
        Record(1),
        EndForward(),
        Adjoint(1),
        Restore(0, Tier.RAM, discard=True),
        Record(0),
        Adjoint(0),
    ]


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_the_closed_form_is_what_dynamic_programming_finds(slots: int) -> None:
    for steps in range(1, 60):
        assert fewest_steps(steps, slots) == fewest_steps_by_recursion(steps, slots), steps


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_no_use_of_the_checkpoints_whatever_beats_the_closed_form(slots: int) -> None:
    for steps in range(1, 9):
        assert fewest_steps(steps, slots) == fewest_steps_by_search(steps, slots), steps


@pytest.mark.parametrize("checkpoints", [0, 1, 2, 3])
def test_no_solve_from_the_initial_state_beats_the_closed_form_with_one_slot_more(checkpoints: int) -> None:
    for steps in range(1, 8):
        for tapes in range(steps + 1):
            found = fewest_solve_steps_by_search(steps, checkpoints, tapes)
            assert fewest_solve_steps(steps, checkpoints, tapes) == found, (steps, tapes)


def test_the_closed_form_has_its_published_values() -> None:
    assert (fewest_steps(100, 8), fewest_steps(1000, 8)) == (345, 5285)


def test_several_steps_without_a_checkpoint_are_impossible() -> None:
    assert fewest_steps(1, 0) == 1
    with pytest.raises(ValueError, match="without a checkpoint"):
        fewest_steps(2, 0)


def test_a_legal_schedule_runs_and_is_counted() -> None:
    run = ModelExecutor(2, {"ram": 1, "disk": 0}).run(two_steps())
    assert (run.forward_steps, run.recomputed_steps, run.reversed) == (2, 1, [1, 0])
    assert run.most_held == {"ram": 1, "disk": 0}


@pytest.mark.parametrize(
    ("position", "replacement", "complaint"),
    [
        (0, [Advance(0, 1, None)], "0 is not in ram"),
        (0, [Advance(0, 1, Tier.DISK)], "more than 0 in disk"),
        (0, [Advance(0, 1, Tier.RAM), Advance(0, 1, None)], "cannot advance from 0"),
        (0, [Advance(0, 3, Tier.RAM)], "no steps from 0 to 3"),
        (1, [], "before the last step"),
        (1, [Record(0)], "cannot record step 0"),
        (2, [], "before the end of the forward pass"),
        (2, [EndForward(), EndForward()], "ended twice"),
        (3, [], "would be lost"),
        (3, [Adjoint(0)], "not the recorded one"),
        (4, [Restore(0, Tier.RAM, discard=False)], "still holds"),
        (4, [], "cannot record step 0"),
        (6, [], "reversed only"),
    ],
)
def test_an_illegal_schedule_is_refused(position: int, replacement: list[Any], complaint: str) -> None:
    actions = two_steps()
    actions[position : position + 1] = replacement
    with pytest.raises(IllegalMoveError, match=complaint):
        ModelExecutor(2, {"ram": 1, "disk": 0}).run(actions)
