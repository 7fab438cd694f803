"""Slots for checkpoints, and the checkpoints of one solve in them.

A pool owns slots of one size and hands them out; it outlives the solves, so that memory and file pages are reused
instead of touched anew. `Checkpoints` is what one solve holds in the pools.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from pnode_dist.trajectory.schedule import Tier
from pnode_dist.trajectory.statistics import SolveStatistics

State = np.ndarray[Any, Any]


class SlotPool(Protocol):
    """Numbered slots, each for one state of this rank."""

    on_disk: bool
    waited: float

    def acquire(self) -> int:
        """The number of a free slot; a new one is made if none is free."""
        ...

    def release(self, slot: int) -> None:
        """Give a slot back."""
        ...

    def write(self, slot: int, state: State, step: int, time: float) -> None:
        """Copy the state before `step`, at `time`, into a slot."""
        ...

    def prefetch(self, slot: int) -> None:
        """Know that a slot will be read soon."""
        ...

    def read(self, slot: int, state: State) -> None:
        """Copy a slot's contents into `state`. Raises `SpillError` if they are lost."""
        ...


class SpillError(RuntimeError):
    """A checkpoint on disk could not be written or read."""


class MemoryPool:
    """Slots in memory, `size` scalars of `dtype` each."""

    on_disk = False
    waited = 0.0

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self._size, self._dtype = size, dtype
        self._slots: list[State] = []
        self._free: list[int] = []

    def acquire(self) -> int:
        if not self._free:
            self._slots.append(np.empty(self._size, dtype=self._dtype))
            return len(self._slots) - 1
        return self._free.pop()

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def write(self, slot: int, state: State, step: int, time: float) -> None:
        np.copyto(self._slots[slot], state)

    def prefetch(self, slot: int) -> None:
        pass

    def read(self, slot: int, state: State) -> None:
        np.copyto(state, self._slots[slot])


class Checkpoints:
    """The checkpoints that one solve holds, by step."""

    def __init__(self, pools: Mapping[Tier, SlotPool], state_bytes: int, statistics: SolveStatistics) -> None:
        self._pools = pools
        self._state_bytes = state_bytes
        self._statistics = statistics
        self._held: dict[int, tuple[Tier, int]] = {}

    def store(self, step: int, tier: Tier, state: State, time: float) -> None:
        """Keep `state`, which is the one before `step`."""
        pool = self._pools[tier]
        slot = pool.acquire()
        self._held[step] = (tier, slot)
        with self._counting(pool):
            pool.write(slot, state, step, time)
        if pool.on_disk:
            self._statistics.bytes_written += self._state_bytes
        occupied = len(self._held) * self._state_bytes
        self._statistics.checkpoint_bytes_peak = max(self._statistics.checkpoint_bytes_peak, occupied)

    def prefetch(self, step: int) -> None:
        """Know that the checkpoint of `step` will be restored soon; nothing happens if it is not held."""
        if step in self._held:
            tier, slot = self._held[step]
            self._pools[tier].prefetch(slot)

    def restore(self, step: int, state: State, discard: bool) -> None:
        """Copy the state before `step` into `state`; with `discard`, free its slot.

        Raises `SpillError` if the checkpoint is lost.
        """
        tier, slot = self._held[step]
        pool = self._pools[tier]
        with self._counting(pool):
            pool.read(slot, state)
        if pool.on_disk:
            self._statistics.bytes_read += self._state_bytes
        if discard:
            del self._held[step]
            pool.release(slot)

    def in_memory(self) -> list[int]:
        """The steps whose checkpoints are held in memory, in order."""
        return sorted(step for step, (tier, _) in self._held.items() if tier is Tier.RAM)

    def drop_disk(self) -> None:
        """Give back the slots on disk."""
        for step in [step for step, (tier, _) in self._held.items() if tier is Tier.DISK]:
            tier, slot = self._held.pop(step)
            self._pools[tier].release(slot)

    @contextmanager
    def _counting(self, pool: SlotPool) -> Iterator[None]:
        before = pool.waited
        yield
        self._statistics.seconds_waiting_for_disk += pool.waited - before

    def clear(self) -> None:
        """Give all slots back."""
        for tier, slot in self._held.values():
            self._pools[tier].release(slot)
        self._held.clear()
