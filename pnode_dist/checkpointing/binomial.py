"""Binomial checkpointing: the schedules with the fewest forward steps.

A. Griewank, A. Walther: Algorithm 799: revolve, ACM Trans. Math. Softw. 26 (2000) (GW2000).
P. Stumm, A. Walther: MultiStage approaches for optimal offline checkpointing, SIAM J. Sci. Comput. 31 (2009).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import comb

from pnode_dist.checkpointing.schedule import Action, Adjoint, Advance, Record, Restart, Restore, Tier, Traffic


def repetitions(steps: int, slots: int) -> int:
    """Return the least r with C(slots + r, slots) >= steps: the most runs of a step before it is recorded."""
    r = 0
    while comb(slots + r, slots) < steps:
        r += 1
    return r


@lru_cache(maxsize=4096)
def optimal_forward_steps(steps: int, slots: int) -> int:
    """Return the fewest forward steps, first runs included, that reverse `steps` steps from `slots` checkpoints.

    (r + 1) n - C(s + r, r - 1) with r the least integer for which C(s + r, s) >= n (GW2000, eq. (2)).
    Raises `ValueError` if there are several steps and no slot.
    """
    if steps <= 1:
        return steps
    if slots < 1:
        raise ValueError(f"{steps} steps cannot be reversed without a checkpoint")
    slots = min(slots, steps - 1)
    r = repetitions(steps, slots)
    return (r + 1) * steps - comb(slots + r, r - 1)


@lru_cache(maxsize=4096)
def first_advance(steps: int, slots: int) -> int:
    """Return the number of steps to run before the next checkpoint, with `slots` of them, that at the start included.

    Every m is optimal for which the steps after the checkpoint need r repetitions with one slot less, and those before
    it r - 1 with all slots (GW2000, fig. 4). This is the least such m. It uses the checkpoints on disk, which are low
    on the stack, the least (for 100 steps from 5 + 5 checkpoints 45 times; the largest m uses them 65 times).
    """
    if slots == 1:
        return steps - 1
    slots = min(slots, steps - 1)
    r = repetitions(steps, slots)
    return max(comb(slots + r - 2, slots), steps - comb(slots + r - 1, slots - 1), 1)


def reversal(first: int, end: int, tiers: Sequence[Tier | None], held: Sequence[int] = ()) -> Iterator[Action]:
    """Reverse steps `first` to `end - 1` from the state before `first`, with one checkpoint in each of `tiers`.

    The tier None is the place of the initial state, which takes no slot. `held` lists checkpoints that exist already,
    in order and in the first of `tiers`. With them the state before `first` is not needed. The steps from the first of
    them on are reversed, with the fewest forward steps that they allow.
    """
    stack = list(held)
    start = first
    if stack:
        start = stack[-1]
        yield from _restored(stack, end, tiers)
    while True:
        if end - start > 1:
            # After a restoration the current state is that of the last checkpoint.
            stored = bool(stack) and stack[-1] == start
            slots = len(tiers) - len(stack) + stored
            last = start + first_advance(end - start, slots)
            yield Advance(start, last, None if stored else tiers[len(stack)])
            if not stored:
                stack.append(start)
            start = last
            continue
        yield Record(start)
        yield Adjoint(start)
        end = start
        if not stack:
            return
        start = stack[-1]
        yield from _restored(stack, end, tiers)


def _restored(stack: list[int], end: int, tiers: Sequence[Tier | None]) -> Iterator[Action]:
    """Restore the last checkpoint of `stack`, and discard it if only one step is left after it."""
    start, tier, discard = stack[-1], tiers[len(stack) - 1], end - stack[-1] == 1
    yield Restart() if tier is None else Restore(start, tier, discard)
    if discard:
        stack.pop()


def reversal_steps(held: Sequence[int], end: int, slots: int) -> int:
    """Return the number of forward steps of `reversal` from existing checkpoints, with `slots` in all."""
    ends = [*held[1:], end]
    return sum(
        optimal_forward_steps(last - first, slots - number)
        for number, (first, last) in enumerate(zip(held, ends, strict=True))
    )


def multistage(steps: int, ram_slots: int, disk_slots: int) -> Iterator[Action]:
    """Reverse `steps` steps from the initial state and checkpoints, by the fewest forward steps possible.

    Raises `ValueError` for no step.
    """
    if steps < 1:
        raise ValueError(f"no schedule for {steps} steps")
    return reversal(0, steps, placement(steps, ram_slots, disk_slots))


def places(steps: int) -> int:
    """Return the most checkpoints that are of use for reversing `steps` steps, besides the initial state."""
    return max(steps - 2, 0)


def placement(steps: int, ram_slots: int, disk_slots: int) -> tuple[Tier | None, ...]:
    """Return the tier of each place on the stack of checkpoints, the initial state's first.

    Memory is used before disk, and for the places that are written and read most often (Stumm & Walther 2009).
    """
    ram = min(ram_slots, places(steps))
    slots = min(ram + disk_slots, places(steps))
    if ram in (0, slots):
        return None, *(Tier.RAM if ram else Tier.DISK,) * slots
    writes, reads = writes_and_reads(steps, slots + 1)
    accesses = [written + read for written, read in zip(writes, reads, strict=True)]
    in_ram = set(sorted(range(1, slots + 1), key=accesses.__getitem__, reverse=True)[:ram])
    return None, *(Tier.RAM if place in in_ram else Tier.DISK for place in range(1, slots + 1))


def traffic(steps: int, ram_slots: int, disk_slots: int) -> Traffic:
    """Return the counts of `multistage`."""
    tiers = placement(steps, ram_slots, disk_slots)
    writes, reads = writes_and_reads(steps, len(tiers))

    def total(numbers: Sequence[int], tier: Tier) -> int:
        return sum(number for number, other in zip(numbers, tiers, strict=True) if other is tier)

    return Traffic(
        forward_steps=optimal_forward_steps(steps, len(tiers)),
        disk_writes=total(writes, Tier.DISK),
        disk_reads=total(reads, Tier.DISK),
        copies=total(writes, Tier.RAM) + total(reads, Tier.RAM),
    )


@lru_cache(maxsize=64)
def writes_and_reads(steps: int, slots: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the numbers of writes and of reads of each place on the stack of checkpoints."""
    # The loop of `reversal` without its actions: 100,000 steps take a fraction of a second.
    writes, reads = [0] * slots, [0] * slots
    stack: list[int] = []
    start, end = 0, steps
    stored = False
    while True:
        if end - start > 1:
            last = start + first_advance(end - start, slots - len(stack) + stored)
            if not stored:
                writes[len(stack)] += 1
                stack.append(start)
            start, stored = last, False
            continue
        end = start
        if not stack:
            return tuple(writes), tuple(reads)
        start = stack[-1]
        reads[len(stack) - 1] += 1
        stored = end - start > 1
        if not stored:
            stack.pop()


def from_held_checkpoints(remaining: int, held: Sequence[int], ram_slots: int) -> Iterator[Action]:
    """Reverse steps `remaining - 1` to 0 from the initial state and `held`, the steps with a checkpoint in memory."""
    return reversal(0, remaining, (None, *(Tier.RAM,) * ram_slots), (0, *held))
