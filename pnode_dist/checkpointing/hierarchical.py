"""Checkpointing in memory and on disk, with the cost of a disk access given in steps.

J. Herrmann, G. Pallez (Aupy): H-Revolve: a framework for adjoint computation on synchronous hierarchical platforms,
ACM Trans. Math. Softw. 46 (2020), for two levels of which the first is free of cost. Between two checkpoints on disk
all slots in memory are used for binomial checkpointing, so the disk is rarely touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pnode_dist.checkpointing.binomial import memory_traffic, optimal_forward_steps, reversal
from pnode_dist.checkpointing.schedule import Action, Adjoint, Advance, Record, Restore, Tier

Costs = np.ndarray[Any, np.dtype[np.float64]]
MOST_STEPS = 4000
_MOST_WORK = 200_000


def is_affordable(steps: int, disk_slots: int) -> bool:
    """Return True if the dynamic program, with work like steps^2 x disk slots, takes less than about a second."""
    return steps <= MOST_STEPS and steps * disk_slots <= _MOST_WORK


@dataclass(frozen=True)
class HierarchicalSchedule:
    """A schedule for `steps` steps with `ram_slots` and `disk_slots` checkpoints, computed by `hierarchical`.

    `cost` is its cost in forward steps, disk accesses included. `forward_steps`, `disk_writes`, `disk_reads` and
    `memory_copies` are its counts. `stretches[d][l]` is the number of steps to advance from a state on disk, with l
    steps to reverse and d more slots on disk, before the rest is reversed; 0: reverse all of them from memory.
    `spills[d][l]` is True if a current state, with d free slots on disk, is written to disk.
    """

    steps: int
    ram_slots: int
    disk_slots: int
    cost: float
    forward_steps: int
    disk_writes: int
    disk_reads: int
    memory_copies: int
    stretches: tuple[np.ndarray[Any, np.dtype[np.int64]], ...]
    spills: tuple[np.ndarray[Any, np.dtype[np.bool_]], ...]

    def actions(self) -> Iterator[Action]:
        """Reverse all steps from the state before the first."""
        tiers = (Tier.RAM,) * self.ram_slots
        # The stack of pending reversals: from the current state, or from one on disk.
        pending: list[tuple[int, int, int, bool]] = [(0, self.steps, self.disk_slots, False)]
        while pending:
            first, end, free, on_disk = pending.pop()
            length = end - first
            if on_disk:
                stretch = int(self.stretches[free][length])
                yield Restore(first, Tier.DISK, discard=stretch == 0)
                if stretch:
                    yield Advance(first, first + stretch, None)
            elif self.spills[free][length]:
                free -= 1
                stretch = int(self.stretches[free][length])
                yield Advance(first, first + stretch, Tier.DISK)
            else:
                stretch = 0
            if stretch:
                pending.append((first, first + stretch, free, True))
                pending.append((first + stretch, end, free, False))
            elif length == 1:
                yield Record(first)
                yield Adjoint(first)
            else:
                yield from reversal(first, end, tiers)


@lru_cache(maxsize=32)
def hierarchical(
    steps: int, ram_slots: int, disk_slots: int, write_cost: float, read_cost: float
) -> HierarchicalSchedule:
    """Return the cheapest schedule, for disk writes and reads that cost `write_cost` and `read_cost` forward steps.

    Memory costs nothing. Raises `ValueError` if there are several steps and no slot.
    """
    if steps < 1 or (steps > 1 and ram_slots + disk_slots < 1):
        raise ValueError(f"no schedule for {steps} steps with {ram_slots} + {disk_slots} checkpoints")
    disk_slots = min(disk_slots, max(steps - 1, 0))
    in_memory: Costs = np.full(steps + 1, np.inf)
    in_memory[0] = 0.0
    for length in range(1, steps + 1):
        if length == 1 or ram_slots:
            in_memory[length] = optimal_forward_steps(length, ram_slots)
    at_hand, never = in_memory, np.zeros(steps + 1, dtype=np.bool_)
    spills, stretches = [never], []
    for free in range(disk_slots + 1):
        stored, stretch = _from_disk(at_hand, in_memory, read_cost)
        stretches.append(stretch)
        if free == disk_slots:
            break
        spilt = write_cost + stored
        # A state on disk that is used with memory alone need not be written.
        spill = (spilt < in_memory) & (stretch > 0)
        at_hand = np.where(spill, spilt, in_memory)
        spills.append(spill)
    writes, reads, copies = _accesses(steps, ram_slots, disk_slots, stretches, spills)
    cost = float(at_hand[steps])
    return HierarchicalSchedule(
        steps,
        ram_slots,
        disk_slots,
        cost,
        round(cost - writes * write_cost - reads * read_cost),
        writes,
        reads,
        copies,
        tuple(stretches),
        tuple(spills),
    )


def _from_disk(at_hand: Costs, in_memory: Costs, read_cost: float) -> tuple[Costs, np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the cost for each number of steps from a current state that is on disk too, and the best first advance."""
    size = len(at_hand)
    cost = in_memory.copy()
    stretch = np.zeros(size, dtype=np.int64)
    # run[j]: run j steps, and at the end read the state again to reverse these.
    run = np.full(size, np.inf)
    run[1:2] = 1 + read_cost + cost[1:2]
    backwards = at_hand[::-1]
    for length in range(2, size):
        candidates = run[1:length] + backwards[size - length : size - 1]
        best = int(candidates.argmin())
        if candidates[best] < cost[length]:
            cost[length], stretch[length] = candidates[best], best + 1
        run[length] = length + read_cost + cost[length]
    return cost, stretch


def _accesses(
    steps: int,
    ram_slots: int,
    disk_slots: int,
    stretches: list[np.ndarray[Any, np.dtype[np.int64]]],
    spills: list[np.ndarray[Any, np.dtype[np.bool_]]],
) -> tuple[int, int, int]:
    """Return the numbers of disk writes, of disk reads, and of copies in memory."""
    writes = reads = copies = 0
    pending = [(steps, disk_slots, False)]
    while pending:
        length, free, on_disk = pending.pop()
        reads += on_disk
        spilt = not on_disk and bool(spills[free][length])
        writes += spilt
        free -= spilt
        stretch = int(stretches[free][length]) if spilt or on_disk else 0
        if stretch:
            pending += [(stretch, free, True), (length - stretch, free, False)]
        elif length > 1:
            copies += memory_traffic(length, ram_slots, 0)
    return writes, reads, copies
