"""Checkpoint schedules: a stream of small immutable actions that run, store, restore and reverse steps.

Schedules are independent of `replay`, which executes them, and `replay` is independent of the way they are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


@dataclass(frozen=True)
class Traffic:
    """The counts of a schedule: forward steps, first runs included, accesses of the disk, and copies in memory."""

    forward_steps: int
    disk_writes: int
    disk_reads: int
    copies: int


def counted(actions: Iterable[Action]) -> Traffic:
    """Return the counts of a schedule."""
    forward_steps = writes = reads = copies = 0
    for action in actions:
        match action:
            case Advance(first, last, tier):
                forward_steps += last - first
                writes += tier is Tier.DISK
                copies += tier is Tier.RAM
            case Record():
                forward_steps += 1
            case Restore(_, tier, _):
                reads += tier is Tier.DISK
                copies += tier is Tier.RAM
    return Traffic(forward_steps, writes, reads, copies)


def whole_solve(head: Iterable[Action], steps: int, kept: int) -> Iterator[Action]:
    """Extend `head` to a solve of `steps` steps whose forward pass keeps the tapes of the last `kept`.

    `head` reverses the steps up to the first of these. Without any, it reverses one more step, an empty one at the end.
    """
    turn = steps - kept
    for action in head:
        match action:
            case Record(step) if step == turn:
                yield from (Record(later) for later in range(turn, steps))
                yield EndForward()
                if kept == 0:
                    yield StartBackward(steps)
                yield from (Adjoint(later) for later in reversed(range(turn + 1, steps)))
            case Adjoint(step) if step == steps:
                pass
            case _:
                yield action
