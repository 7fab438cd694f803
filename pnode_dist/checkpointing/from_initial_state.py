"""Binomial schedules of solves whose initial state is at hand anyway: autograd keeps it, as it was given.

It needs no checkpoint then, and a solve whose budget is too small for even one recording ends its forward pass without
any: it is a solve of one step more, the last of which is nothing to run and nothing to reverse.
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
    """The tier of each place on the stack of checkpoints after the first, which is the initial state's.

    `steps` are those that are reversed by the schedule. Those places lie in memory that are used most.
    """
    places = min(ram_slots + disk_slots, max(steps - 2, 0))
    return most_used_in_memory(stack_accesses(steps, places + 1)[1:], ram_slots) if places else ()


def traffic(steps: int, places: tuple[Tier, ...]) -> tuple[tuple[int, int], int]:
    """How many checkpoints are written to disk and read from it, and how many are copied to memory and from it."""
    if not places:
        return (0, 0), 0
    writes, reads = (counts[1:] for counts in writes_and_reads(steps, len(places) + 1))
    on_disk = [place for place, tier in enumerate(places) if tier is Tier.DISK]
    in_memory = [place for place, tier in enumerate(places) if tier is Tier.RAM]
    to_disk, from_disk = sum(writes[place] for place in on_disk), sum(reads[place] for place in on_disk)
    return (to_disk, from_disk), sum(writes[place] + reads[place] for place in in_memory)


def actions(steps: int, places: tuple[Tier, ...]) -> Iterator[Action]:
    """Reverse `steps` steps, the last of which is recorded as soon as it is reached."""
    for action in reversal(0, steps, (Tier.RAM, *places)):
        match action:
            case Advance(0, last, _):
                yield Advance(0, last, None)
            case Restore(0):
                yield Restart()
            case _:
                yield action


def without_tape(head: Iterator[Action], steps: int) -> Iterator[Action]:
    """`head`, which reverses one step more, as a solve of `steps` steps that records none in its forward pass."""
    for action in head:
        match action:
            case Record(step) if step == steps:
                yield EndForward()
                yield StartBackward(steps)
            case Adjoint(step) if step == steps:
                pass
            case _:
                yield action
