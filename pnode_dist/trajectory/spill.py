"""Checkpoints on disk: one HDF5 file per rank, written and read by a thread in the background.

A state to be written is copied into one of a fixed number of staging buffers; when none is free, the solver waits,
so memory never grows. A state that still is in its staging buffer is read from there. The schedule is known ahead, so
states are fetched before they are needed. Every slot's checksum is compared when it is read.
"""

from __future__ import annotations

import queue
import threading
import time as clock
import weakref
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pnode_dist.trajectory.scratch import PrivateDirectory
from pnode_dist.trajectory.store import SpillError, State

STAGING_BUFFERS = 3


class _Phase(Enum):
    EMPTY = "empty"
    WRITING = "writing"
    ON_DISK = "on disk"
    FETCHING = "fetching"
    FETCHED = "fetched"
    FAILED = "failed"


@dataclass
class _Slot:
    """One slot. The staging buffer `buffer` holds its contents while it is being written or has been fetched."""

    number: int
    phase: _Phase = _Phase.EMPTY
    buffer: int | None = None
    dataset: h5py.Dataset | None = None
    crc: int = 0
    error: str = ""
    given_back: bool = True

    @property
    def busy(self) -> bool:
        return self.phase in (_Phase.WRITING, _Phase.FETCHING)


class _SlotFile:
    """The file, the staging buffers and the thread: what `SpillPool` must not be kept alive by."""

    def __init__(self, size: int, dtype: np.dtype[Any], parent: Path, rank: int) -> None:
        self.size, self.dtype = size, dtype
        self._parent, self._rank = parent, rank
        self.changed = threading.Condition()
        self.slots: list[_Slot] = []
        self.buffers: list[State] = []
        self.free_buffers: list[int] = []
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._directory: PrivateDirectory | None = None
        self._file: h5py.File | None = None

    def start(self) -> None:
        """Make the buffers and start the thread, the first time."""
        if self._thread is None:
            self.buffers = [np.empty(self.size, dtype=self.dtype) for _ in range(STAGING_BUFFERS)]
            self.free_buffers = list(range(STAGING_BUFFERS))
            self._thread = threading.Thread(target=self._work, name="pnode-dist-spill", daemon=True)
            self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Let the thread do `job` after those submitted before."""
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def open(self) -> h5py.File:
        """The file, made if it is not there. Raises `OSError` if it cannot be."""
        if self._file is None:
            self._directory = PrivateDirectory(self._parent)
            path = self._directory.path / f"trajectory-rank{self._rank}.h5"
            # The file belongs to this process alone: locks would only trouble network file systems.
            self._file = h5py.File(path, "w", libver="latest", locking=False)
            path.chmod(0o600)
            self._file.attrs["rank"] = self._rank
        return self._file

    def write(self, slot: _Slot, step: int, time: float) -> None:
        """Put a slot's staging buffer into the file. Runs in the thread."""
        assert slot.buffer is not None
        state = self.buffers[slot.buffer]
        phase, error = _Phase.ON_DISK, ""
        try:
            slot.crc = zlib.crc32(state.data)
            if slot.dataset is None:
                slot.dataset = self.open().create_dataset(f"slot/{slot.number}", (self.size,), self.dtype)
            if self.size:
                slot.dataset.write_direct(state)
            for name, value in (("step", step), ("time", time), ("crc32", slot.crc)):
                slot.dataset.attrs[name] = value
        except (OSError, RuntimeError, ValueError) as reason:
            phase, error = _Phase.FAILED, f"checkpoint of step {step} could not be written: {_said(reason)}"
        self._finish(slot, phase, error)

    def fetch(self, slot: _Slot) -> None:
        """Get a slot's contents into its staging buffer. Runs in the thread."""
        assert slot.buffer is not None
        assert slot.dataset is not None
        state = self.buffers[slot.buffer]
        phase, error = _Phase.FETCHED, ""
        try:
            if self.size:
                slot.dataset.read_direct(state)
            if zlib.crc32(state.data) != slot.crc:
                phase, error = _Phase.FAILED, f"slot {slot.number} is damaged: its checksum is wrong"
        except (OSError, RuntimeError, ValueError) as reason:
            phase, error = _Phase.FAILED, f"slot {slot.number} could not be read: {_said(reason)}"
        self._finish(slot, phase, error)

    def _finish(self, slot: _Slot, phase: _Phase, error: str) -> None:
        with self.changed:
            slot.phase, slot.error = phase, error
            if phase is not _Phase.FETCHED or slot.given_back:
                self.drop_buffer(slot)
            self.changed.notify_all()

    def drop_buffer(self, slot: _Slot) -> None:
        """Free a slot's staging buffer, if it has one. Call it holding `changed`."""
        if slot.buffer is not None:
            self.free_buffers.append(slot.buffer)
            slot.buffer = None
            self.changed.notify_all()

    def close(self) -> None:
        """End the thread and remove the file."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
        try:
            if self._file is not None:
                self._file.close()
        except (OSError, RuntimeError):
            # A full disk fails here again; the file goes anyway.
            pass
        if self._directory is not None:
            self._directory.remove()


class SpillPool:
    """Slots in an HDF5 file of this rank's own, made on the first write and removed with the pool.

    Slot k is the dataset `/slot/k`, `size` scalars of `dtype`, whose attributes `step`, `time` and `crc32` say which
    state it holds; slots are rewritten in place. `waited` is the time in seconds that the solver waited for the disk.
    Whatever goes wrong with a slot comes out as `SpillError` when it is read.
    """

    on_disk = True

    def __init__(self, size: int, dtype: np.dtype[Any], directory: Path, rank: int) -> None:
        self._file = _SlotFile(size, dtype, directory, rank)
        self.waited = 0.0
        weakref.finalize(self, self._file.close)

    def acquire(self) -> int:
        slots = self._file.slots
        with suppress(OSError):
            # If it fails it fails again when the slot is written, and is told to whoever reads it.
            self._file.open()
        with self._file.changed:
            # A slot that was given back while it was being written is free a little later.
            self._wait(lambda: not any(s.given_back and s.busy for s in slots) or self._idle() is not None)
            slot = self._idle()
            if slot is None:
                slot = _Slot(len(slots))
                slots.append(slot)
            slot.given_back = False
            return slot.number

    def _idle(self) -> _Slot | None:
        return next((slot for slot in self._file.slots if slot.given_back and not slot.busy), None)

    def release(self, slot: int) -> None:
        place = self._file.slots[slot]
        with self._file.changed:
            place.given_back = True
            if not place.busy:
                self._file.drop_buffer(place)

    def write(self, slot: int, state: State, step: int, time: float) -> None:
        place = self._file.slots[slot]
        self._take_buffer(place, _Phase.WRITING, lambda buffer: np.copyto(buffer, state))
        file = self._file  # The thread must not hold this pool: it ends with it.
        file.submit(lambda: file.write(place, step, time))

    def prefetch(self, slot: int) -> None:
        """Begin to fetch a slot that will be read soon, if a staging buffer can be spared."""
        place = self._file.slots[slot]
        with self._file.changed:
            # The last buffer is for writing: no write has to wait for a read that is due after it.
            if place.phase is not _Phase.ON_DISK or len(self._file.free_buffers) < 2:
                return
        self._fetch(place)

    def read(self, slot: int, state: State) -> None:
        place = self._file.slots[slot]
        with self._file.changed:
            if place.phase is _Phase.WRITING:
                assert place.buffer is not None
                np.copyto(state, self._file.buffers[place.buffer])
                return
        if place.phase is _Phase.ON_DISK:
            self._fetch(place)
        with self._file.changed:
            self._wait(lambda: not place.busy)
            if place.phase is _Phase.FAILED:
                raise SpillError(place.error)
            assert place.buffer is not None
            np.copyto(state, self._file.buffers[place.buffer])
            self._file.drop_buffer(place)
            place.phase = _Phase.ON_DISK

    def _fetch(self, place: _Slot) -> None:
        self._take_buffer(place, _Phase.FETCHING, lambda buffer: None)
        file = self._file
        file.submit(lambda: file.fetch(place))

    def _take_buffer(self, place: _Slot, phase: _Phase, fill: Callable[[State], None]) -> None:
        self._file.start()
        with self._file.changed:
            self._wait(lambda: bool(self._file.free_buffers))
            place.buffer = self._file.free_buffers.pop()
            fill(self._file.buffers[place.buffer])
            place.phase = phase

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until the thread has made `ready` true. Call it holding `changed`."""
        if not ready():
            began = clock.perf_counter()
            self._file.changed.wait_for(ready)
            self.waited += clock.perf_counter() - began


def _said(error: Exception) -> str:
    """The system's words for an error of HDF5, which wraps them in its own."""
    text = str(error)
    if "error message = '" in text:
        return text.partition("error message = '")[2].partition("'")[0]
    return getattr(error, "strerror", None) or text
