"""Checkpoint schedules: what to run, keep, restore and reverse, as a stream of small immutable actions.

A schedule knows nothing of who executes it. The algorithms come from the checkpoint-schedules package; this module
puts their actions into the few words that the replay needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import checkpoint_schedules


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


Action = Advance | Record | EndForward | Restore | Restart | Adjoint

_TIERS = {
    checkpoint_schedules.StorageType.RAM: Tier.RAM,
    checkpoint_schedules.StorageType.DISK: Tier.DISK,
}
_CACHED_STEPS = 2048


def multistage(steps: int, ram_slots: int, disk_slots: int) -> Iterator[Action]:
    """The schedule of Stumm & Walther (2009) for `steps` steps with so many checkpoints in memory and on disk.

    It runs the fewest forward steps possible with `ram_slots + disk_slots` checkpoints (binomial checkpointing,
    Griewank & Walther 2000) and puts the most used checkpoints into memory. Planning takes time proportional to the
    number of actions. Raises `ValueError` if `steps` exceeds 1 and there is no slot.

    P. Stumm, A. Walther: MultiStage approaches for optimal offline checkpointing, SIAM J. Sci. Comput. 31 (2009);
    A. Griewank, A. Walther: Algorithm 799: revolve, ACM Trans. Math. Softw. 26 (2000), eq. (2).
    """
    if steps < 1 or (steps > 1 and ram_slots + disk_slots < 1):
        raise ValueError(f"no schedule for {steps} steps with {ram_slots} + {disk_slots} checkpoints")
    if steps <= _CACHED_STEPS:
        return iter(_multistage_cached(steps, min(ram_slots, steps - 1), min(disk_slots, steps - 1)))
    return _multistage(steps, ram_slots, disk_slots)


def with_graphs(steps: int, graphs: int, ram_slots: int, disk_slots: int) -> Iterator[Action]:
    """`multistage` for the first steps, and for the last `graphs` (1 or more) recordings that the forward pass leaves.

    Without any slot the first steps are each reached from the initial state.
    """
    first_graph = max(steps - graphs + 1, 1)
    head = multistage(first_graph, ram_slots, disk_slots) if ram_slots + disk_slots else from_start(first_graph)
    for action in head:
        if isinstance(action, EndForward):
            yield from (Record(step) for step in range(first_graph, steps))
            yield action
            yield from (Adjoint(step) for step in reversed(range(first_graph, steps)))
        else:
            yield action


def from_start(steps: int) -> Iterator[Action]:
    """A schedule without any checkpoint: every step is reached anew from the initial state."""
    if steps > 1:
        yield Advance(0, steps - 1, None)
    yield Record(steps - 1)
    yield EndForward()
    yield Adjoint(steps - 1)
    for step in reversed(range(steps - 1)):
        yield Restart()
        if step:
            yield Advance(0, step, None)
        yield Record(step)
        yield Adjoint(step)


def without_disk(remaining: int, held: Sequence[int], ram_slots: int) -> Iterator[Action]:
    """Reverse steps `remaining - 1` to 0 when the checkpoints on disk are lost.

    `held` are the steps whose checkpoints in memory are left, in order. Between them, binomial schedules use the slots
    that are free; each checkpoint is given up when everything after it is reversed.
    """
    ends = [*held[1:], remaining]
    for number in reversed(range(len(held))):
        yield Restore(held[number], Tier.RAM, discard=True)
        yield from _shifted(held[number], ends[number], ram_slots - number)
    start = held[0] if held else remaining
    if start:
        yield Restart()
        if ram_slots or start == 1:
            yield from _shifted(0, start, ram_slots)
        else:
            yield from (action for action in from_start(start) if not isinstance(action, EndForward))


def _shifted(first: int, end: int, ram_slots: int) -> Iterator[Action]:
    """Binomial checkpointing of steps `first` to `end - 1`, from the state before `first`."""
    for action in multistage(end - first, ram_slots, 0):
        match action:
            case Advance(start, last, tier):
                yield Advance(first + start, first + last, tier)
            case Record(step):
                yield Record(first + step)
            case Adjoint(step):
                yield Adjoint(first + step)
            case Restore(step, tier, discard):
                yield Restore(first + step, tier, discard)


@lru_cache(maxsize=64)
def _multistage_cached(steps: int, ram_slots: int, disk_slots: int) -> tuple[Action, ...]:
    return tuple(_multistage(steps, ram_slots, disk_slots))


def _multistage(steps: int, ram_slots: int, disk_slots: int) -> Iterator[Action]:
    schedule = checkpoint_schedules.MultistageCheckpointSchedule(steps, ram_slots, disk_slots)
    for action in schedule:
        match action:
            case checkpoint_schedules.Forward(write_adj_deps=True):
                yield Record(action.n0)
            case checkpoint_schedules.Forward():
                yield Advance(action.n0, action.n1, _TIERS[action.storage] if action.write_ics else None)
            case checkpoint_schedules.Reverse():
                yield Adjoint(action.n0)
            case checkpoint_schedules.Copy():
                yield Restore(action.n, _TIERS[action.from_storage], discard=False)
            case checkpoint_schedules.Move():
                yield Restore(action.n, _TIERS[action.from_storage], discard=True)
            case checkpoint_schedules.EndForward():
                yield EndForward()
            case checkpoint_schedules.EndReverse():
                return
