"""Checkpoint schedules: a stream of small immutable actions that run, store, restore and reverse steps.

Schedules are independent of `replay`, which executes them, and `replay` is independent of the way they are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Tier(Enum):
    """The storage of a checkpoint."""

    RAM = "ram"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Advance:
    """Run steps `first` to `last - 1` forward, after storing the state before step `first` in `checkpoint` if given."""

    first: int
    last: int
    checkpoint: Tier | None


@dataclass(frozen=True, slots=True)
class Record:
    """Run `step` forward, and keep its tape."""

    step: int


@dataclass(frozen=True, slots=True)
class EndForward:
    """End the forward pass: the actions that follow belong to the backward pass."""


@dataclass(frozen=True, slots=True)
class StartBackward:
    """Begin the backward pass over `steps` steps, none of which has a tape."""

    steps: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Restore the checkpoint of the state before `step`, and free its slot if `discard`."""

    step: int
    tier: Tier
    discard: bool


@dataclass(frozen=True, slots=True)
class Restart:
    """Restore the initial state of the solve."""


@dataclass(frozen=True, slots=True)
class Adjoint:
    """Reverse `step`, which has a tape."""

    step: int


Action = Advance | Record | EndForward | StartBackward | Restore | Restart | Adjoint


def with_last_recorded(head: Iterator[Action], first: int, steps: int) -> Iterator[Action]:
    """Extend `head`, which reverses steps 0 to `first - 1`, to a whole solve of `steps` steps.

    The forward pass ends after the first `Record` of `head`. The steps from `first` on are recorded with it.
    """
    forward = True
    for action in head:
        yield action
        if forward and isinstance(action, Record):
            forward = False
            yield from (Record(step) for step in range(first, steps))
            yield EndForward()
            yield from (Adjoint(step) for step in reversed(range(first, steps)))
