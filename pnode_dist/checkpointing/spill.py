"""Checkpoints on disk: one HDF5 file per rank, written and read by a background thread.

A state to be written is copied into one of a fixed number of staging buffers. If none is free, the solver waits, so the
memory is bounded. A state that is still in its staging buffer is read from there. The schedule is known, so states are
fetched before they are needed. The checksum of a slot is verified when it is read.

The file is flushed after every slot, so that other processes can read it, also after a crash.
"""

from __future__ import annotations

import atexit
import os
import queue
import socket
import threading
import time as clock
import uuid
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from isal import isal_zlib

from pnode_dist.checkpointing.store import PrecisionError, SpillError, State, copy_rounded
from pnode_dist.system.scratch import PrivateDirectory

Shapes = tuple[tuple[int, ...], ...]
STAGING_BUFFERS = 3
LABEL = np.dtype([("step", "i8"), ("time", "f8"), ("crc32", "u4")])
_ONE_LABEL = h5py.h5s.create_simple((1,))
_GROWTH = 64
_WIDEST_CHUNK = 2**28  # HDF5's chunks are smaller than 4 GiB.


class _Phase(Enum):
    EMPTY = "empty"
    WRITING = "writing"
    ON_DISK = "on disk"
    FETCHING = "fetching"
    FETCHED = "fetched"
    FAILED = "failed"


@dataclass
class _Slot:
    """One slot. `buffer` is its staging buffer while it is being written, being fetched, or fetched."""

    number: int
    phase: _Phase = _Phase.EMPTY
    buffer: int | None = None
    crc: int = 0
    error: str = ""
    given_back: bool = True

    @property
    def busy(self) -> bool:
        return self.phase in (_Phase.WRITING, _Phase.FETCHING)


class _SlotFile:
    """The file, the staging buffers and the thread of a `SpillPool`. The thread refers to this, and not to the pool."""

    def __init__(self, size: int, dtype: np.dtype[Any], parent: Path, rank: int, shapes: Shapes | None) -> None:
        self.size, self.dtype = size, dtype
        self._shapes: Shapes = shapes or ((size,),)
        self._datasets: tuple[h5py.Dataset, h5py.Dataset] | None = None
        self._one_state = h5py.h5s.create_simple((size,))
        self._parent, self._rank = parent, rank
        self.changed = threading.Condition()
        self.slots: list[_Slot] = []
        self.buffers: list[State] = []
        self.free_buffers: list[int] = []
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._opening = threading.Lock()
        self._directory: PrivateDirectory | None = None
        self._file: h5py.File | None = None
        self._failed = False

    def start(self) -> None:
        """Make the buffers and start the thread, at the first call."""
        if self._thread is None:
            self.buffers = [np.empty(self.size, dtype=self.dtype) for _ in range(STAGING_BUFFERS)]
            self.free_buffers = list(range(STAGING_BUFFERS))
            self._thread = threading.Thread(target=self._work, name="pnode-dist-spill", daemon=True)
            self._thread.start()
            _started.add(self)

    def submit(self, job: Callable[[], None]) -> None:
        """Queue `job` for the thread."""
        self._jobs.put(job)

    def finish(self) -> None:
        """Wait until the thread has run all jobs. Returns at once if there is no thread, as in a forked process."""
        done = threading.Event()
        self.submit(done.set)
        while self._thread is not None and self._thread.is_alive() and not done.wait(0.1):
            pass

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def open(self) -> h5py.File:
        """Return the file, and create it if needed. Raises `OSError` if that fails."""
        # After a failure the solver and the thread may both try again: hence the lock.
        with self._opening:
            if self._file is None:
                self._directory = PrivateDirectory(self._parent)
                path = self._directory.path / f"trajectory-rank{self._rank}.h5"
                # Only this process writes the file, and locks fail on some network file systems. Formats newer than
                # 1.8 mark the file as being written, and no other process could open it.
                file = h5py.File(path, "w", libver="v108", locking=False, rdcc_nbytes=0)
                path.chmod(0o600)
                for name, value in _provenance(self._rank).items():
                    file.attrs[name] = value
                self._file = file
            return self._file

    def _room_for(self, slot: int) -> tuple[h5py.Dataset, h5py.Dataset]:
        """Return the datasets of states and labels, and extend them to have a row for `slot`."""
        file = self.open()
        if self._datasets is None:
            width = max(self.size, 1)
            # Chunks of one row bypass HDF5's cache, and are allocated in the file at their first write.
            states = file.create_dataset(
                "state", (0, width), self.dtype, chunks=(1, min(width, _WIDEST_CHUNK)), maxshape=(None, width)
            )
            for number, shape in enumerate(self._shapes):
                states.attrs[f"shape{number}"] = np.array(shape, dtype=np.int64)
            empty = np.array((-1, np.nan, 0), dtype=LABEL)
            labels = file.create_dataset("label", (0,), LABEL, chunks=(_GROWTH,), maxshape=(None,), fillvalue=empty)
            self._datasets = states, labels
        states, labels = self._datasets
        if slot >= len(labels):
            states.resize(slot + _GROWTH, axis=0)
            labels.resize(slot + _GROWTH, axis=0)
        return states, labels

    def write(self, slot: _Slot, step: int, time: float) -> None:
        """Write a slot's staging buffer to the file. Runs in the thread."""
        assert slot.buffer is not None
        state = self.buffers[slot.buffer]
        phase, error = _Phase.ON_DISK, ""
        try:
            slot.crc = isal_zlib.crc32(state.data)
            states, labels = self._room_for(slot.number)
            if self.size:
                states.id.write(self._one_state, _row_of(states, slot.number, self.size), state)
            label = np.array([(step, time, slot.crc)], dtype=LABEL)
            labels.id.write(_ONE_LABEL, _row_of(labels, slot.number), label)
            states.file.flush()
        except Exception as reason:  # Whatever it is: the solver waits for this thread.
            phase, error = _Phase.FAILED, f"checkpoint of step {step} could not be written: {_said(reason)}"
        self._finish(slot, phase, error)

    def fetch(self, slot: _Slot) -> None:
        """Read a slot from the file into its staging buffer. Runs in the thread."""
        assert slot.buffer is not None
        state = self.buffers[slot.buffer]
        phase, error = _Phase.FETCHED, ""
        try:
            states, _ = self._room_for(slot.number)
            if self.size:
                states.id.read(self._one_state, _row_of(states, slot.number, self.size), state)
            if isal_zlib.crc32(state.data) != slot.crc:
                phase, error = _Phase.FAILED, f"slot {slot.number} is damaged: its checksum is wrong"
        except Exception as reason:  # Whatever it is: the solver waits for this thread.
            phase, error = _Phase.FAILED, f"slot {slot.number} could not be read: {_said(reason)}"
        self._finish(slot, phase, error)

    def _finish(self, slot: _Slot, phase: _Phase, error: str) -> None:
        with self.changed:
            slot.phase, slot.error = phase, error
            self._failed = self._failed or phase is _Phase.FAILED
            if phase is not _Phase.FETCHED or slot.given_back:
                self.drop_buffer(slot)
            self.changed.notify_all()

    def drop_buffer(self, slot: _Slot) -> None:
        """Free a slot's staging buffer, if it has one. The caller holds `changed`."""
        if slot.buffer is not None:
            self.free_buffers.append(slot.buffer)
            slot.buffer = None
            self.changed.notify_all()

    def close(self) -> None:
        """End the thread and remove the file."""
        if self._thread is not None:
            self._jobs.put(None)
            if self._thread is threading.current_thread():
                # Garbage collection called this inside a job. The thread and the file go when the job has ended.
                return
            self._thread.join()
        self._remove()

    def drop_failed_file(self) -> None:
        """Remove a file that failed, if no slot in it is needed. The next slot is then in a new file."""
        with self.changed:
            if self._failed and all(slot.given_back for slot in self.slots):
                self.changed.wait_for(lambda: not any(slot.busy for slot in self.slots))
                self._failed = False
                self._remove()

    def _remove(self) -> None:
        file, self._file = self._file, None
        self._datasets = None
        # A full disk fails here again. The file is removed anyway.
        with suppress(OSError, RuntimeError):
            if file is not None:
                file.close()
        if self._directory is not None:
            self._directory.remove()


_started: weakref.WeakSet[_SlotFile] = weakref.WeakSet()


@atexit.register
def _finish_all() -> None:
    """Wait for all threads when the interpreter ends."""
    # At exit h5py unregisters its converters without its lock, and HDF5 crashes if another thread is inside. Exit
    # functions run in reverse order: h5py's was registered before this one, so it runs after it.
    for file in list(_started):
        file.finish()


class SpillPool:
    """A pool of slots in an HDF5 file of this rank, created at the first write and removed with the pool.

    Slot k is row k of the dataset `/state`, with `size` scalars of `dtype`. Row k of `/label` describes its state:
    `step` (-1: none), `time` and `crc32`. The attributes `shape0`, `shape1`, ... of `/state` are the `shapes` of the
    parts, which follow each other in a row. Slots are rewritten in place. `waited` is the time in seconds that the
    solver waited for the disk. Any error of a slot is raised as `SpillError` when the slot is read.
    """

    on_disk = True

    def __init__(
        self, size: int, dtype: np.dtype[Any], directory: Path, rank: int, shapes: Shapes | None = None
    ) -> None:
        self._file = _SlotFile(size, dtype, directory, rank, shapes)
        self.waited = 0.0
        weakref.finalize(self, self._file.close)

    def acquire(self) -> int:
        slots = self._file.slots
        self._file.drop_failed_file()
        with suppress(OSError):
            # An error occurs again when the slot is written, and is raised when it is read.
            self._file.open()
        with self._file.changed:
            # A slot that was released while it was being written becomes free a little later.
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

    def write(self, slot: int, state: State, step: int, time: float) -> float:
        place = self._file.slots[slot]
        rounding = self._take_buffer(place, _Phase.WRITING, lambda buffer: copy_rounded(state, buffer))
        file = self._file  # The job must not refer to the pool, whose end is the end of the thread.
        file.submit(lambda: file.write(place, step, time))
        return rounding

    def prefetch(self, slot: int) -> None:
        """Begin to fetch a slot that will be read soon, if two staging buffers are free."""
        place = self._file.slots[slot]
        with self._file.changed:
            # The last free buffer is left for writing: a write must not wait for a read that is due later.
            if place.phase is not _Phase.ON_DISK or len(self._file.free_buffers) < 2:
                return
        self._fetch(place)

    def read(self, slot: int, state: State) -> None:
        place = self._file.slots[slot]
        with self._file.changed:
            if place.phase is _Phase.WRITING:
                assert place.buffer is not None
                np.copyto(state, self._file.buffers[place.buffer], casting="same_kind")
                return
        if place.phase is _Phase.ON_DISK:
            self._fetch(place)
        with self._file.changed:
            self._wait(lambda: not place.busy)
            if place.phase is _Phase.FAILED:
                raise SpillError(place.error)
            assert place.buffer is not None
            np.copyto(state, self._file.buffers[place.buffer], casting="same_kind")
            self._file.drop_buffer(place)
            place.phase = _Phase.ON_DISK

    def seconds(self, state: State) -> tuple[float, float]:
        slot = self.acquire()
        try:
            self._write_through(slot, state)
            written = self._write_through(slot, state)
            copy = state.copy()
            began = clock.perf_counter()
            self.read(slot, copy)
            return written, clock.perf_counter() - began
        finally:
            self.release(slot)

    def _write_through(self, slot: int, state: State) -> float:
        """Write a slot and wait until it is on disk. Returns the seconds it took."""
        began = clock.perf_counter()
        self.write(slot, state, 0, 0.0)
        place = self._file.slots[slot]
        with self._file.changed:
            self._file.changed.wait_for(lambda: not place.busy)
        return clock.perf_counter() - began

    def _fetch(self, place: _Slot) -> None:
        self._take_buffer(place, _Phase.FETCHING, lambda buffer: 0.0)
        file = self._file
        file.submit(lambda: file.fetch(place))

    def _take_buffer(self, place: _Slot, phase: _Phase, fill: Callable[[State], float]) -> float:
        """Assign a staging buffer to a slot and fill it. Returns the result of `fill`; frees the buffer if it fails."""
        self._file.start()
        with self._file.changed:
            # A reused slot may still be being written, or have been fetched without a read.
            self._wait(lambda: not place.busy)
            self._file.drop_buffer(place)
            self._wait(lambda: bool(self._file.free_buffers))
            place.buffer = self._file.free_buffers.pop()
            try:
                rounding = fill(self._file.buffers[place.buffer])
            except PrecisionError as error:
                self._file.drop_buffer(place)
                place.phase, place.error = _Phase.FAILED, str(error)
                raise
            place.phase = phase
            return rounding

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready` is true, and count the time. The caller holds `changed`."""
        if not ready():
            began = clock.perf_counter()
            self._file.changed.wait_for(ready)
            self.waited += clock.perf_counter() - began


@cache
def _run_id(pid: int) -> str:
    """Return a random identifier of a process, the same for all its files. A forked process has another one."""
    return str(uuid.uuid4())


def _provenance(rank: int) -> dict[str, str | int]:
    """Return the attributes that describe the origin of a file."""
    return {
        "rank": rank,
        "run_id": _run_id(os.getpid()),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "program": f"pnode_dist {metadata.version('pnode-dist')}",
    }


def _row_of(dataset: h5py.Dataset, row: int, width: int | None = None) -> h5py.h5s.SpaceID:
    """Select the row of one slot in a dataset."""
    space = dataset.id.get_space()
    space.select_hyperslab(*(((row,), (1,)) if width is None else ((row, 0), (1, width))))
    return space


def _said(error: Exception) -> str:
    """Return the system's message in an error of HDF5, without HDF5's own text."""
    text = str(error)
    if "error message = '" in text:
        return text.partition("error message = '")[2].partition("'")[0]
    return getattr(error, "strerror", None) or text
