"""Checkpointing in memory and on disk, with the cost of a disk access given in steps.

J. Herrmann, G. Pallez (Aupy): H-Revolve: a framework for adjoint computation on synchronous hierarchical platforms,
ACM Trans. Math. Softw. 46 (2020), for two levels of which the first is free of cost. Between two checkpoints on disk
all slots in memory are used for binomial checkpointing, so the disk is rarely touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from pnode_dist.checkpointing.binomial import optimal_forward_steps, places, reversal
from pnode_dist.checkpointing.schedule import Action, Advance, Restart, Restore, Tier, Traffic, counted

Costs = np.ndarray[Any, np.dtype[np.float64]]
MOST_STEPS = 4000
_MOST_WORK = 200_000


def is_affordable(steps: int, disk_slots: int) -> bool:
    """Return True if the dynamic program, with work like steps^2 x disk slots, takes less than about a second."""
    return steps <= MOST_STEPS and steps * disk_slots <= _MOST_WORK


@dataclass(frozen=True)
class HierarchicalSchedule:
    """A schedule for `steps` steps with `ram_slots` and `disk_slots` checkpoints, computed by `hierarchical`.

    `cost` is its cost in forward steps, disk accesses included. `stretches[d][l]` is the number of steps to advance
    from a state on disk, with l steps to reverse and d more slots on disk, before the rest is reversed; 0: reverse all
    of them from memory. The last of `stretches`, with all slots on disk free, is that of the initial state.
    `spills[d][l]` is True if a current state, with d free slots on disk, is written to disk.
    """

    steps: int
    ram_slots: int
    disk_slots: int
    cost: float
    stretches: tuple[np.ndarray[Any, np.dtype[np.int64]], ...]
    spills: tuple[np.ndarray[Any, np.dtype[np.bool_]], ...]

    @cached_property
    def traffic(self) -> Traffic:
        """The counts of the schedule."""
        return counted(self.actions())

    def actions(self) -> Iterator[Action]:
        """Reverse all steps from the initial state."""
        in_memory = (Tier.RAM,) * self.ram_slots
        # The stack of pending reversals, each from the current state, or from one that is held: the initial state or
        # one on disk.
        pending: list[tuple[int, int, int, bool]] = [(0, self.steps, self.disk_slots, True)]
        while pending:
            first, end, free, held = pending.pop()
            length, stretch = end - first, 0
            if held:
                stretch = int(self.stretches[free][length])
                if first:
                    yield Restore(first, Tier.DISK, discard=stretch == 0)
                elif end < self.steps:
                    yield Restart()
                if stretch:
                    yield Advance(first, first + stretch, None)
            elif self.spills[free][length]:
                free -= 1
                stretch = int(self.stretches[free][length])
                yield Advance(first, first + stretch, Tier.DISK)
            if stretch:
                pending.append((first, first + stretch, free, True))
                pending.append((first + stretch, end, free, False))
            else:
                yield from reversal(first, end, in_memory if first else (None, *in_memory))


@lru_cache(maxsize=32)
def hierarchical(
    steps: int, ram_slots: int, disk_slots: int, write_cost: float, read_cost: float
) -> HierarchicalSchedule:
    """Return the cheapest schedule, for disk writes and reads that cost `write_cost` and `read_cost` forward steps.

    Memory and the initial state cost nothing. The initial state is treated like a state on a disk that is read free of
    cost. Raises `ValueError` for no step.
    """
    if steps < 1:
        raise ValueError(f"no schedule for {steps} steps")
    disk_slots = min(disk_slots, places(steps))
    in_memory = _in_memory(steps, ram_slots)
    at_hand, never = in_memory, np.zeros(steps + 1, dtype=np.bool_)
    spills, stretches = [never], []
    for _ in range(disk_slots):
        stored, stretch = _from_held(at_hand, in_memory, read_cost)
        stretches.append(stretch)
        spilt = write_cost + stored
        # A state on disk that is used with memory alone need not be written.
        spill = (spilt < in_memory) & (stretch > 0)
        at_hand = np.where(spill, spilt, in_memory)
        spills.append(spill)
    cost, stretch = _from_held(at_hand, _in_memory(steps, ram_slots + 1), 0.0)
    return HierarchicalSchedule(steps, ram_slots, disk_slots, float(cost[steps]), (*stretches, stretch), tuple(spills))


def _in_memory(steps: int, slots: int) -> Costs:
    """Return the cost for each number of steps up to `steps` from a current state, without the disk."""
    cost: Costs = np.full(steps + 1, np.inf)
    cost[:2] = 0.0, 1.0
    if slots:
        cost[2:] = [optimal_forward_steps(length, slots) for length in range(2, steps + 1)]
    return cost


def _from_held(at_hand: Costs, in_memory: Costs, read_cost: float) -> tuple[Costs, np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the cost for each number of steps from a current state that is held too, and the best first advance."""
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
