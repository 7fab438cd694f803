"""The language of checkpoint schedules: what to run, keep, restore and reverse, as a stream of small immutable actions.

A schedule knows nothing of who executes it, and the replay nothing of how it was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Tier(Enum):
    """Where a checkpoint lies."""

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
    """Run `step` forward and keep what its adjoint needs."""

    step: int


@dataclass(frozen=True, slots=True)
class EndForward:
    """The forward pass is complete; what follows belongs to the backward pass."""


@dataclass(frozen=True, slots=True)
class StartBackward:
    """The backward pass over so many steps begins, none of which is recorded."""

    steps: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Put the stored state before `step` back, and free its slot if `discard`."""

    step: int
    tier: Tier
    discard: bool


@dataclass(frozen=True, slots=True)
class Restart:
    """Put the initial state of the solve back."""


@dataclass(frozen=True, slots=True)
class Adjoint:
    """Reverse `step`, which was recorded."""

    step: int


Action = Advance | Record | EndForward | StartBackward | Restore | Restart | Adjoint


def with_last_recorded(head: Iterator[Action], first: int, steps: int) -> Iterator[Action]:
    """`head`, which reverses steps 0 to `first - 1`, as a whole solve of `steps` steps.

    The forward pass ends after `head`'s first recording, with which it also records the steps from `first` on.
    """
    forward = True
    for action in head:
        yield action
        if forward and isinstance(action, Record):
            forward = False
            yield from (Record(step) for step in range(first, steps))
            yield EndForward()
            yield from (Adjoint(step) for step in reversed(range(first, steps)))
