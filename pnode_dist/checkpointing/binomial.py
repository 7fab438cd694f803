"""Binomial checkpointing: the schedules with the fewest forward steps.

A. Griewank, A. Walther: Algorithm 799: revolve, ACM Trans. Math. Softw. 26 (2000) (GW2000).
P. Stumm, A. Walther: MultiStage approaches for optimal offline checkpointing, SIAM J. Sci. Comput. 31 (2009).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import comb

from pnode_dist.checkpointing.schedule import Action, Adjoint, Advance, Record, Restart, Restore, Tier


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
    on the stack, the least (for 100 steps from 5 + 5 checkpoints 35 times; the largest m uses them 59 times).
    """
    if slots == 1:
        return steps - 1
    slots = min(slots, steps - 1)
    r = repetitions(steps, slots)
    return max(comb(slots + r - 2, slots), steps - comb(slots + r - 1, slots - 1), 1)


def reversal(first: int, end: int, tiers: Sequence[Tier], held: Sequence[int] = ()) -> Iterator[Action]:
    """Reverse steps `first` to `end - 1` from the state before `first`, with one checkpoint in each of `tiers`.

    `held` lists checkpoints that exist already, in order and in the first of `tiers`. With them the state before
    `first` is not needed. The steps from the first of them on are reversed, with the fewest forward steps that they
    allow.
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


def _restored(stack: list[int], end: int, tiers: Sequence[Tier]) -> Iterator[Action]:
    """Restore the last checkpoint of `stack`, and discard it if only one step is left after it."""
    start, discard = stack[-1], end - stack[-1] == 1
    yield Restore(start, tiers[len(stack) - 1], discard)
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
    """Reverse `steps` steps with checkpoints in memory and on disk, by the fewest forward steps possible.

    The places on the stack of checkpoints that are written and read most often are in memory (Stumm & Walther 2009).
    Raises `ValueError` if there are several steps and no slot.
    """
    if steps < 1 or (steps > 1 and ram_slots + disk_slots < 1):
        raise ValueError(f"no schedule for {steps} steps with {ram_slots} + {disk_slots} checkpoints")
    return reversal(0, steps, placement(steps, ram_slots, disk_slots))


def placement(steps: int, ram_slots: int, disk_slots: int) -> tuple[Tier, ...]:
    """Return the tier of each place on the stack of checkpoints. Memory is used before disk."""
    most = max(steps - 1, 0)
    ram = min(ram_slots, most)
    places = min(ram + disk_slots, most)
    if ram == places or ram == 0:
        return (Tier.RAM if ram else Tier.DISK,) * places
    return most_used_in_memory(stack_accesses(steps, places), ram)


def most_used_in_memory(accesses: Sequence[int], ram_slots: int) -> tuple[Tier, ...]:
    """Return a tier for each place, given its number of accesses: memory for the `ram_slots` that are used most."""
    in_ram = set(sorted(range(len(accesses)), key=accesses.__getitem__, reverse=True)[:ram_slots])
    return tuple(Tier.RAM if place in in_ram else Tier.DISK for place in range(len(accesses)))


def disk_traffic(steps: int, ram_slots: int, disk_slots: int) -> tuple[int, int]:
    """Return the numbers of checkpoints that `multistage` writes to disk and reads from it."""
    tiers = placement(steps, ram_slots, disk_slots)
    if Tier.DISK not in tiers:
        return 0, 0
    writes, reads = writes_and_reads(steps, len(tiers))
    on_disk = [place for place, tier in enumerate(tiers) if tier is Tier.DISK]
    return sum(writes[place] for place in on_disk), sum(reads[place] for place in on_disk)


def memory_traffic(steps: int, ram_slots: int, disk_slots: int) -> int:
    """Return the number of checkpoints that `multistage` copies to memory and from it."""
    tiers = placement(steps, ram_slots, disk_slots)
    accesses = stack_accesses(steps, len(tiers))
    return sum(accesses[place] for place, tier in enumerate(tiers) if tier is Tier.RAM)


def stack_accesses(steps: int, slots: int) -> tuple[int, ...]:
    """Return the number of accesses, written and read, of each place on the stack of checkpoints."""
    writes, reads = writes_and_reads(steps, slots)
    return tuple(written + read for written, read in zip(writes, reads, strict=True))


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


def without_checkpoints(steps: int) -> Iterator[Action]:
    """Reverse `steps` steps without any checkpoint: recompute every step from the initial state."""
    if steps > 1:
        yield Advance(0, steps - 1, None)
    yield Record(steps - 1)
    yield Adjoint(steps - 1)
    for step in reversed(range(steps - 1)):
        yield Restart()
        if step:
            yield Advance(0, step, None)
        yield Record(step)
        yield Adjoint(step)


def from_held_checkpoints(remaining: int, held: Sequence[int], ram_slots: int) -> Iterator[Action]:
    """Reverse steps `remaining - 1` to 0 from `held`, the steps that still have a checkpoint in memory, in order."""
    tiers = (Tier.RAM,) * ram_slots
    if held:
        yield from reversal(held[0], remaining, tiers, held)
    start = held[0] if held else remaining
    if start:
        yield Restart()
        yield from reversal(0, start, tiers) if ram_slots or start == 1 else without_checkpoints(start)
