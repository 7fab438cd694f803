"""Checkpoint schedules: what to run, keep, restore and reverse, as a stream of small immutable actions.

A schedule knows nothing of who executes it. The algorithms come from the checkpoint-schedules package; this module
puts their actions into the few words that the replay needs.
"""

from __future__ import annotations

from collections.abc import Iterator
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
class Adjoint:
    """Reverse `step`, which was recorded."""

    step: int


Action = Advance | Record | EndForward | Restore | Adjoint

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

    Raises `ValueError` as `multistage` does.
    """
    first_graph = max(steps - graphs + 1, 1)
    for action in multistage(first_graph, ram_slots, disk_slots):
        if isinstance(action, EndForward):
            yield from (Record(step) for step in range(first_graph, steps))
            yield action
            yield from (Adjoint(step) for step in reversed(range(first_graph, steps)))
        else:
            yield action


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
