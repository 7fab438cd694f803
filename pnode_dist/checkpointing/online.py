"""Choosing checkpoints while it is not known how many steps there will be.

Q. Wang, P. Moin, G. Iaccarino: Minimal repetition dynamic checkpointing algorithm for unsteady adjoint calculation,
SIAM J. Sci. Comput. 31 (2009), algorithm 1.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from itertools import chain

from pnode_dist.checkpointing.binomial import from_held_checkpoints, reversal
from pnode_dist.checkpointing.schedule import Action, Adjoint, StartBackward, Tier
from pnode_dist.checkpointing.store import Checkpoints, State


class OnlinePlacement:
    """Which checkpoints to hold as steps go by, at most `slots` of them.

    Every checkpoint has a level. One is dispensable if a later one has a higher level; a new one takes the place of a
    dispensable one, and where there is none that of the one before it, a level higher. From what is held at the end,
    whenever that is, no step needs to be run more often than in the best schedule for that number of steps (counting
    the most frequent step; Wang, Moin & Iaccarino 2009, theorem 1). The one before step 0 is never given up.
    """

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError("several steps cannot be reversed without a checkpoint")
        self._slots = slots
        self._held = 0
        # What is not dispensable: levels never increase from the first to the last.
        self._lasting: list[tuple[int, float]] = []
        self._dispensable: list[int] = []

    def before(self, step: int) -> tuple[bool, int | None]:
        """Whether to keep the state before `step`, and which step's checkpoint to give up for it.

        Call it for the steps 0, 1, 2, ... in turn.
        """
        if step == 0:
            self._lasting.append((0, math.inf))
            self._held = 1
            return True, None
        if self._held < self._slots:
            self._lasting.append((step, 0.0))
            self._held += 1
            return True, None
        if self._dispensable:
            self._lasting.append((step, 0.0))
            return True, self._dispensable.pop()
        last, level = self._lasting[-1]
        if last == 0:
            return False, None
        self._lasting.pop()
        while self._lasting[-1][1] <= level:
            self._dispensable.append(self._lasting.pop()[0])
        self._lasting.append((step, level + 1))
        return True, last


class OnlineCheckpoints:
    """The checkpoints of a forward pass of unknown length, in memory and on disk.

    New ones go to memory; when it is full the earliest there, which the backward pass needs last, moves to disk.
    From what is held at the end the steps are reversed by the fewest forward steps that it allows. In all they are at
    most 4/3 of the offline optimum and one (measured for up to 4000 steps and 64 slots; 1.2 is usual for 2 to 8).
    Without any slot, which is what a lost disk may leave, every step is reached anew from the initial state.
    """

    def __init__(self, checkpoints: Checkpoints, ram_slots: int, disk_slots: int) -> None:
        self._checkpoints = checkpoints
        self._ram, self._disk = ram_slots, disk_slots
        self._placement = OnlinePlacement(ram_slots + disk_slots) if ram_slots + disk_slots else None
        self._in_memory: list[int] = []

    def before(self, step: int, time: float, state: State) -> None:
        """Keep `state`, the one before `step` at `time`, if it is worth a slot. Call it for every step in turn."""
        if self._placement is None:
            return
        keep, given_up = self._placement.before(step)
        if given_up is not None:
            self._checkpoints.discard(given_up)
            self._forget(given_up)
        if not keep:
            return
        if self._ram and len(self._in_memory) == self._ram:
            self._checkpoints.spill(self._in_memory.pop(0))
        self._checkpoints.store(step, Tier.RAM if self._ram else Tier.DISK, state, time)
        if self._ram:
            self._in_memory.append(step)

    def _forget(self, step: int) -> None:
        at = bisect_left(self._in_memory, step)
        if at < len(self._in_memory) and self._in_memory[at] == step:
            del self._in_memory[at]

    def reversal(self, steps: int, recorded: bool) -> Iterator[Action]:
        """The backward pass after so many steps. With `recorded` all are at hand, and no checkpoint is needed."""
        if recorded:
            self._checkpoints.clear()
            return iter([Adjoint(step) for step in reversed(range(steps))])
        if self._placement is None:
            return chain([StartBackward(steps)], from_held_checkpoints(steps, [], 0))
        held = self._checkpoints.held()
        tiers = list(held.values())
        free_disk = self._disk - tiers.count(Tier.DISK)
        free_ram = self._ram - tiers.count(Tier.RAM)
        most = max(steps - 1 - len(tiers), 0)
        ram = min(free_ram, most)
        free = [Tier.DISK] * min(free_disk, most - ram) + [Tier.RAM] * ram
        return chain([StartBackward(steps)], reversal(0, steps, [*tiers, *free], list(held)))
