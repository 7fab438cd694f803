"""Checkpoints on disk: one HDF5 file per rank, on a file system that should be local to the node."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pnode_dist.trajectory.store import State


class SpillPool:
    """Slots in an HDF5 file of this rank's own, made on the first write and removed with the pool.

    Slot k is the dataset `/slot/k`, `size` scalars of `dtype`, whose attributes `step` and `time` say which state it
    holds. Slots are rewritten in place. The file lies in a new directory under `directory`, readable by its owner
    only and with an unguessable name. Raises `OSError` when it cannot be written.
    """

    on_disk = True

    def __init__(self, size: int, dtype: np.dtype[Any], directory: Path, rank: int) -> None:
        self._size, self._dtype = size, dtype
        self._directory, self._rank = directory, rank
        self._file: h5py.File | None = None
        self._slots: list[h5py.Dataset] = []
        self._free: list[int] = []

    def _open(self) -> h5py.File:
        if self._file is None:
            private = Path(tempfile.mkdtemp(prefix="pnode-dist-", dir=self._directory))
            # The file is private to this process: locks would only trouble network file systems.
            self._file = h5py.File(private / f"trajectory-rank{self._rank}.h5", "w", libver="latest", locking=False)
            self._file.attrs["rank"] = self._rank
            weakref.finalize(self, _remove, self._file, private)
        return self._file

    def acquire(self) -> int:
        if not self._free:
            number = len(self._slots)
            self._slots.append(self._open().create_dataset(f"slot/{number}", shape=(self._size,), dtype=self._dtype))
            return number
        return self._free.pop()

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def write(self, slot: int, state: State, step: int, time: float) -> None:
        dataset = self._slots[slot]
        if self._size:
            dataset.write_direct(state)
        dataset.attrs["step"] = step
        dataset.attrs["time"] = time

    def read(self, slot: int, state: State) -> None:
        if self._size:
            self._slots[slot].read_direct(state)


def _remove(file: h5py.File, directory: Path) -> None:
    file.close()
    shutil.rmtree(directory, ignore_errors=True)
