"""Snapshot files of a run: the last few are kept, each with a checksum file, and are written in the background.

A snapshot is the file `step-N.pt`. It is valid once its label `step-N.json`, which holds its description and checksum,
exists. Both files are written completely and flushed to disk before they are renamed to their final names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, cast

import torch
from isal import isal_zlib

from pnode_dist.errors import ConfigurationError
from pnode_dist.runs.snapshot import Snapshot, from_contents
from pnode_dist.system.atomic_file import remove_unfinished, write_atomically

DIRECTORY = "snapshots"
_NAME = re.compile(r"step-(\d{8,})\.json")
_BLOCK = 2**24


class SnapshotError(Exception):
    """A snapshot cannot be read; the message gives the reason."""


@dataclass(frozen=True)
class Label:
    """Label of a snapshot: the position of the run, its number of ranks, and the size and checksum of the file.

    `config` is the text of the configuration, and `problem` the hash of the source of a user-defined problem.
    """

    step: int
    epoch: int
    saved: str
    ranks: int
    bytes: int
    crc32: int
    config: str
    problem: str | None = None


class _Counted:
    """File wrapper for `torch.save` that computes the checksum and the size of the written data."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc = self.size = 0

    def write(self, data: Any) -> int:
        self.crc = isal_zlib.crc32(data, self.crc)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def path_of(directory: Path, step: int) -> Path:
    """Return the path of the snapshot after `step` optimiser steps in the run directory."""
    return directory / DIRECTORY / f"step-{step:08d}.pt"


def steps_in(directory: Path) -> list[int]:
    """Return the optimiser steps of the snapshots in the run directory, in descending order."""
    try:
        names = [_NAME.fullmatch(path.name) for path in (directory / DIRECTORY).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((int(name.group(1)) for name in names if name), reverse=True)


def write(directory: Path, snapshot: Snapshot, saved: str, config: str, keep: int, problem: str | None = None) -> None:
    """Write a snapshot to the run directory and remove all but the last `keep`. Raises `OSError`."""
    position = snapshot.position
    path = path_of(directory, position.step)
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o700)
    remove_unfinished(path.parent, "step-*")
    label: Label | None = None

    def save(file: BinaryIO) -> None:
        nonlocal label
        counted = _Counted(file)
        snapshot.save(cast(BinaryIO, counted))
        ranks = len(snapshot.ranks)
        label = Label(position.step, position.epoch, saved, ranks, counted.size, counted.crc, config, problem)

    # Remove the label of an earlier snapshot of the same step, which does not match the new file.
    path.with_suffix(".json").unlink(missing_ok=True)
    write_atomically(path, save)
    assert label is not None
    write_atomically(path.with_suffix(".json"), (json.dumps(asdict(label)) + "\n").encode())
    for step in [step for step in steps_in(directory) if step <= position.step][keep:]:
        remove(directory, step)


def remove(directory: Path, step: int) -> None:
    """Remove a snapshot."""
    path = path_of(directory, step)
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def remove_after(directory: Path, step: int) -> None:
    """Remove the snapshots of steps after `step`."""
    for later in steps_in(directory):
        if later > step:
            remove(directory, later)


def read_label(path: Path) -> Label:
    """Read the label of the snapshot `path`. Raises `SnapshotError`."""
    try:
        label = Label(**json.loads(path.with_suffix(".json").read_bytes()))
    except FileNotFoundError:
        raise SnapshotError("is not complete: its .json is not there") from None
    except (OSError, ValueError, TypeError) as error:
        raise SnapshotError(f"is damaged: its .json cannot be read: {error}") from None
    return label


def check(path: Path) -> Label:
    """Verify the size and checksum of a snapshot and return its label.

    Raises `SnapshotError` if the snapshot is incomplete, unreadable or damaged.
    """
    label = read_label(path)
    crc = size = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                crc, size = isal_zlib.crc32(block, crc), size + len(block)
    except OSError as error:
        raise SnapshotError(f"cannot be read: {error.strerror}") from None
    if size != label.bytes:
        raise SnapshotError(f"is damaged: it has {size} bytes and was written with {label.bytes}")
    if crc != label.crc32:
        raise SnapshotError("is damaged: its checksum is wrong")
    return label


def load(path: Path) -> Snapshot:
    """Load a snapshot, memory-mapped so that only the accessed parts are read. Executes no code from the file.

    Raises `ConfigurationError` if the file is not a snapshot.
    """
    try:
        return from_contents(torch.load(path, weights_only=True, map_location="cpu", mmap=True))
    except (OSError, RuntimeError, EOFError, UnpicklingError, KeyError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigurationError(f"snapshot {path}: cannot be read: {reason[:120]}") from None


class Background:
    """Run one job at a time in a thread; the next call raises the exception of a failed job."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "pnode-dist-snapshot")
        self._job: Future[None] | None = None

    @property
    def idle(self) -> bool:
        """True if no job is running."""
        return self._job is None or self._job.done()

    def start(self, job: Callable[[], None]) -> None:
        """Start `job` after the previous one has ended. Raises the exception of the previous job."""
        self.wait()
        self._job = self._thread.submit(job)

    def check(self) -> None:
        """Raise the exception of the last job, if it has failed."""
        if self.idle:
            self.wait()

    def wait(self) -> None:
        """Wait for the job. Raises its exception."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Wait for the job and end the thread."""
        self._thread.shutdown()
