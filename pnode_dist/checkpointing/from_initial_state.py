"""Binomial schedules that restart from the initial state, which autograd keeps alive and which needs no checkpoint.

If the budget does not suffice for one tape, the forward pass ends without any. Such a solve has the schedule of a solve
with one more step, an empty one at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

from pnode_dist.checkpointing.binomial import most_used_in_memory, reversal, stack_accesses, writes_and_reads
from pnode_dist.checkpointing.schedule import (
    Action,
    Adjoint,
    Advance,
    EndForward,
    Record,
    Restart,
    Restore,
    StartBackward,
    Tier,
)


def tiers(steps: int, ram_slots: int, disk_slots: int) -> tuple[Tier, ...]:
    """Return the tier of each place on the stack of checkpoints, without the first, which is the initial state's.

    `steps` is the number of steps that the schedule reverses. The places that are used most are in memory.
    """
    places = min(ram_slots + disk_slots, max(steps - 2, 0))
    return most_used_in_memory(stack_accesses(steps, places + 1)[1:], ram_slots) if places else ()


def traffic(steps: int, places: tuple[Tier, ...]) -> tuple[tuple[int, int], int]:
    """Return the numbers of checkpoints written to disk and read from it, and the number of copies in memory."""
    if not places:
        return (0, 0), 0
    writes, reads = (counts[1:] for counts in writes_and_reads(steps, len(places) + 1))
    on_disk = [place for place, tier in enumerate(places) if tier is Tier.DISK]
    in_memory = [place for place, tier in enumerate(places) if tier is Tier.RAM]
    to_disk, from_disk = sum(writes[place] for place in on_disk), sum(reads[place] for place in on_disk)
    return (to_disk, from_disk), sum(writes[place] + reads[place] for place in in_memory)


def actions(steps: int, places: tuple[Tier, ...]) -> Iterator[Action]:
    """Reverse `steps` steps. The last one is recorded as soon as it is reached."""
    for action in reversal(0, steps, (Tier.RAM, *places)):
        match action:
            case Advance(0, last, _):
                yield Advance(0, last, None)
            case Restore(0):
                yield Restart()
            case _:
                yield action


def without_tape(head: Iterator[Action], steps: int) -> Iterator[Action]:
    """Turn `head`, which reverses one more step, into a solve of `steps` steps whose forward pass keeps no tape."""
    for action in head:
        match action:
            case Record(step) if step == steps:
                yield EndForward()
                yield StartBackward(steps)
            case Adjoint(step) if step == steps:
                pass
            case _:
                yield action
