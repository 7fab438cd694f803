"""Pools of checkpoint slots, and the checkpoints of one solve.

A pool owns slots of one size. It outlives the solves, so that they reuse its memory and file pages. `Checkpoints` are
the slots that one solve holds.
"""

from __future__ import annotations

import time as clock
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from pnode_dist.checkpointing.schedule import Tier
from pnode_dist.checkpointing.statistics import SolveStatistics

State = np.ndarray[Any, Any]
_BLOCK = 2**15


class SlotPool(Protocol):
    """A pool of numbered slots, each for this rank's part of one state."""

    on_disk: bool
    waited: float

    def acquire(self) -> int:
        """Return the number of a free slot, and make a new slot if none is free."""
        ...

    def release(self, slot: int) -> None:
        """Release a slot."""
        ...

    def write(self, slot: int, state: State, step: int, time: float) -> float:
        """Copy the state before `step`, at `time`, into a slot. Returns the rounding error, see `copy_rounded`.

        Raises `PrecisionError` if a value does not fit the slot's type.
        """
        ...

    def prefetch(self, slot: int) -> None:
        """Begin to fetch a slot that will be read soon."""
        ...

    def read(self, slot: int, state: State) -> None:
        """Copy a slot's contents into `state`. Raises `SpillError` if they are lost."""
        ...

    def seconds(self, state: State) -> tuple[float, float]:
        """Measure the seconds of writing `state` to a slot that was used before, and of reading it."""
        ...


class SpillError(RuntimeError):
    """A checkpoint on disk could not be written or read."""


class PrecisionError(RuntimeError):
    """A state has values too large for the type of its checkpoints."""


def copy_rounded(state: State, slot: State) -> float:
    """Copy `state` into `slot`, which may be of a narrower type.

    Returns the largest rounding error relative to the largest entry; 0 if the type holds every value. Entries that are
    not finite are copied and do not count. Raises `PrecisionError` if a finite value does not fit: the checkpoint would
    silently be another state.
    """
    if np.can_cast(state.dtype, slot.dtype, "safe"):
        np.copyto(slot, state)
        return 0.0
    largest = error = 0.0
    # Ignore the caller's floating-point error settings: overflow is detected from the result.
    with np.errstate(all="ignore"):
        # Use blocks that fit the cache: temporaries of a whole state would exceed the budget.
        for start in range(0, state.size, _BLOCK):
            values, rounded = state[start : start + _BLOCK], slot[start : start + _BLOCK]
            np.copyto(rounded, values, casting="same_kind")
            magnitude = _magnitude(values)
            if not np.isfinite(magnitude):
                finite = np.isfinite(values)
                values, rounded = values[finite], rounded[finite]
                magnitude = _magnitude(values)
            difference = _magnitude(values - rounded)
            if not np.isfinite(difference):
                raise PrecisionError(
                    f"trajectory: a value of {magnitude:.3g} in the state does not fit {slot.dtype}: use "
                    'checkpoint_dtype = "float64"'
                )
            largest, error = max(largest, magnitude), max(error, difference)
    return error / largest if largest else 0.0


def _magnitude(values: State) -> float:
    return float(max(values.max(), -values.min())) if values.size else 0.0


class MemoryPool:
    """A pool of slots in memory, with `size` scalars of `dtype` each."""

    on_disk = False
    waited = 0.0

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self._size, self._dtype = size, dtype
        self._slots: dict[int, State] = {}
        self._free: list[int] = []
        self._made = 0

    def acquire(self) -> int:
        if not self._free:
            self._made += 1
            self._slots[self._made] = np.empty(self._size, dtype=self._dtype)
            return self._made
        return self._free.pop()

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def trim(self, slots: int) -> None:
        """Free unused slots, until at most `slots` are left in all."""
        while self._free and len(self._slots) > slots:
            del self._slots[self._free.pop()]

    def contents(self, slot: int) -> State:
        """Return the contents of a slot, without a copy."""
        return self._slots[slot]

    def seconds(self, state: State) -> tuple[float, float]:
        slot, copy = np.empty(self._size, dtype=self._dtype), state.copy()
        copy_rounded(state, slot)
        began = clock.perf_counter()
        copy_rounded(state, slot)
        written = clock.perf_counter()
        np.copyto(copy, slot, casting="same_kind")
        return written - began, clock.perf_counter() - written

    def write(self, slot: int, state: State, step: int, time: float) -> float:
        return copy_rounded(state, self._slots[slot])

    def prefetch(self, slot: int) -> None:
        pass

    def read(self, slot: int, state: State) -> None:
        np.copyto(state, self._slots[slot], casting="same_kind")


class Carried(Protocol):
    """State of f, besides that of the solve, that belongs to a checkpoint."""

    def mark(self, step: int) -> Any:
        """Return a mark of the present state, before `step`."""
        ...

    def restore(self, mark: Any) -> None:
        """Restore the state of a mark."""
        ...


class Checkpoints:
    """The checkpoints of one solve, by step, in slots of `state_bytes` each, with marks of the state `carried` by f."""

    def __init__(
        self,
        pools: Mapping[Tier, SlotPool],
        state_bytes: int,
        statistics: SolveStatistics,
        carried: Carried | None = None,
    ) -> None:
        self._carried = carried
        self._marks: dict[int, Any] = {}
        self._pools = pools
        self._state_bytes = state_bytes
        self._statistics = statistics
        self._held: dict[int, tuple[Tier, int]] = {}
        self._times: dict[int, float] = {}

    def store(self, step: int, tier: Tier, state: State, time: float) -> None:
        """Store `state`, the one before `step`, in a slot of `tier`.

        Raises `PrecisionError` if a value does not fit the type of the checkpoints.
        """
        pool = self._pools[tier]
        slot = pool.acquire()
        self._held[step], self._times[step] = (tier, slot), time
        if self._carried is not None:
            self._marks[step] = self._carried.mark(step)
        with self._counting(pool):
            rounding = pool.write(slot, state, step, time)
        self._statistics.largest_rounding = max(self._statistics.largest_rounding, rounding)
        if pool.on_disk:
            self._statistics.bytes_written += self._state_bytes
        occupied = len(self._held) * self._state_bytes
        self._statistics.checkpoint_bytes_peak = max(self._statistics.checkpoint_bytes_peak, occupied)

    def prefetch(self, step: int) -> None:
        """Begin to fetch the checkpoint of `step`, which will be restored soon, if it is held."""
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
        if self._carried is not None:
            self._carried.restore(self._marks[step])
        if discard:
            del self._held[step]
            self._marks.pop(step, None)
            pool.release(slot)

    def discard(self, step: int) -> None:
        """Release the checkpoint of `step`."""
        tier, slot = self._held.pop(step)
        self._marks.pop(step, None)
        self._pools[tier].release(slot)

    def spill(self, step: int) -> None:
        """Move the checkpoint of `step` from memory to disk."""
        tier, slot = self._held[step]
        memory = self._pools[tier]
        assert isinstance(memory, MemoryPool)
        mark = self._marks.get(step)
        self.store(step, Tier.DISK, memory.contents(slot), self._times[step])
        self._marks[step] = mark
        memory.release(slot)

    def held(self) -> dict[int, Tier]:
        """Return the tier of each checkpoint, in the order of steps."""
        return {step: self._held[step][0] for step in sorted(self._held)}

    def in_memory(self) -> list[int]:
        """Return the steps whose checkpoints are in memory, in order."""
        return sorted(step for step, (tier, _) in self._held.items() if tier is Tier.RAM)

    def drop_disk(self) -> None:
        """Release the checkpoints on disk."""
        for step in [step for step, (tier, _) in self._held.items() if tier is Tier.DISK]:
            self.discard(step)

    @contextmanager
    def _counting(self, pool: SlotPool) -> Iterator[None]:
        before = pool.waited
        yield
        self._statistics.seconds_waiting_for_disk += pool.waited - before

    def clear(self) -> None:
        """Release all checkpoints."""
        for tier, slot in self._held.values():
            self._pools[tier].release(slot)
        self._marks.clear()
        self._held.clear()
