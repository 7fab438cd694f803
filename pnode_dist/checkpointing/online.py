"""Online checkpointing, for a number of steps that is not known beforehand.

Q. Wang, P. Moin, G. Iaccarino: Minimal repetition dynamic checkpointing algorithm for unsteady adjoint calculation,
SIAM J. Sci. Comput. 31 (2009), algorithm 1.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from itertools import chain

from pnode_dist.checkpointing.binomial import reversal
from pnode_dist.checkpointing.schedule import Action, Adjoint, StartBackward, Tier
from pnode_dist.checkpointing.store import Checkpoints, State


class OnlinePlacement:
    """The choice of at most `slots` checkpoints during the forward pass, beside the initial state.

    Every checkpoint has a level. A checkpoint is dispensable if a later one has a higher level. A new checkpoint
    replaces a dispensable one. If there is none, it replaces the last checkpoint and has the next higher level. After
    any number of steps, the checkpoints held allow a reversal whose most frequent step runs no more often than in the
    best schedule for that number of steps (Wang, Moin & Iaccarino 2009, theorem 1). There the initial state is a
    checkpoint, which is never replaced.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._held = 0
        # The initial state, and the checkpoints that are not dispensable, with levels that never increase.
        self._lasting: list[tuple[int, float]] = [(0, math.inf)]
        self._dispensable: list[int] = []

    def before(self, step: int) -> tuple[bool, int | None]:
        """Return True to store the state before `step`, and the step whose checkpoint it replaces.

        Call it for the steps 1, 2, 3, ... in turn.
        """
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

    New checkpoints go to memory. If memory is full, its earliest checkpoint, which the backward pass needs last, moves
    to disk. The backward pass takes the fewest forward steps that the checkpoints at the end allow. In all, these are
    at most 4/3 of the offline optimum plus one (measured for up to 4000 steps and 64 slots; 1.2 is usual for 2 to 8).
    The initial state takes no slot. Without any, every step is recomputed from it.
    """

    def __init__(self, checkpoints: Checkpoints, ram_slots: int, disk_slots: int) -> None:
        self._checkpoints = checkpoints
        self._ram, self._disk = ram_slots, disk_slots
        self._placement = OnlinePlacement(ram_slots + disk_slots)
        self._in_memory: list[int] = []

    def before(self, step: int, time: float, state: State) -> None:
        """Store `state`, the one before `step` at `time`, if the placement asks for it. Call it for every step."""
        if step == 0:
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
        """Return the schedule of the backward pass. With `recorded` all steps have tapes, and need no checkpoint."""
        if recorded:
            self._checkpoints.clear()
            return iter([Adjoint(step) for step in reversed(range(steps))])
        held = self._checkpoints.held()
        tiers = list(held.values())
        free_disk = self._disk - tiers.count(Tier.DISK)
        free_ram = self._ram - tiers.count(Tier.RAM)
        most = max(steps - 1 - len(tiers), 0)
        ram = min(free_ram, most)
        free = [Tier.DISK] * min(free_disk, most - ram) + [Tier.RAM] * ram
        return chain([StartBackward(steps)], reversal(0, steps, [None, *tiers, *free], [0, *held]))
