"""The snapshots of a run on disk: the last few, each with a checksum beside it, written in the background.

A snapshot is `step-N.pt`, and counts once `step-N.json` is there, which says what it is and what its checksum is. Both
are written to the end, and have reached the disk, before they get their names.
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
    """A snapshot cannot be read as one; says why."""


@dataclass(frozen=True)
class Label:
    """What stands beside a snapshot: how far the run had come, on how many ranks, and what is in the file.

    `config` is the text of the configuration, and `problem` the hash of the source of a user's own problem.
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
    """A file for `torch.save` that knows the checksum and the size of what was written to it."""

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
    """Where the snapshot after `step` optimiser steps is, in the run directory."""
    return directory / DIRECTORY / f"step-{step:08d}.pt"


def steps_in(directory: Path) -> list[int]:
    """After how many optimiser steps there are snapshots in the run directory, last ones first."""
    try:
        names = [_NAME.fullmatch(path.name) for path in (directory / DIRECTORY).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((int(name.group(1)) for name in names if name), reverse=True)


def write(directory: Path, snapshot: Snapshot, saved: str, config: str, keep: int, problem: str | None = None) -> None:
    """Write a snapshot into the run directory, and remove all but the last `keep`. Raises `OSError`."""
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

    # One of the same step must not be taken for this one meanwhile.
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
    """Remove the snapshots of a run beyond `step`, which it will take anew."""
    for later in steps_in(directory):
        if later > step:
            remove(directory, later)


def read_label(path: Path) -> Label:
    """What stands beside the snapshot `path`. Raises `SnapshotError`."""
    try:
        label = Label(**json.loads(path.with_suffix(".json").read_bytes()))
    except FileNotFoundError:
        raise SnapshotError("is not complete: its .json is not there") from None
    except (OSError, ValueError, TypeError) as error:
        raise SnapshotError(f"is damaged: its .json cannot be read: {error}") from None
    return label


def check(path: Path) -> Label:
    """Compare a snapshot with its checksum; its label. Raises `SnapshotError` if it is not what was written."""
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
    """Read a snapshot, of which only what is used gets into memory. Runs no code that may be in it.

    Raises `ConfigurationError` if it is not one.
    """
    try:
        return from_contents(torch.load(path, weights_only=True, map_location="cpu", mmap=True))
    except (OSError, RuntimeError, EOFError, UnpicklingError, KeyError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigurationError(f"snapshot {path}: cannot be read: {reason[:120]}") from None


class Background:
    """One job at a time in a thread; what goes wrong in it is raised by who asks next."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "pnode-dist-snapshot")
        self._job: Future[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is being done."""
        return self._job is None or self._job.done()

    def start(self, job: Callable[[], None]) -> None:
        """Do `job` once the one before is done. Raises what that one did."""
        self.wait()
        self._job = self._thread.submit(job)

    def check(self) -> None:
        """Raise what the last job did, if it has ended."""
        if self.idle:
            self.wait()

    def wait(self) -> None:
        """Wait for the job. Raises what it did."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Wait for the job, and end the thread."""
        self._thread.shutdown()
