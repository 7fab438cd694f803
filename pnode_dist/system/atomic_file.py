"""Atomic writes: a file is complete or absent, also after a crash."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], None], durable: bool = True) -> None:
    """Write a file, readable by its owner only. At any time either the old file or the complete new one exists.

    With `durable` the file has reached the disk on return, and survives a crash of the machine. Raises `OSError` if it
    cannot be written; the old file is then unchanged.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Write a file's contents, or a directory's names, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(directory: Path, name: str) -> None:
    """Remove the leftovers of killed writers of the file `name` (a pattern), which no process may be writing."""
    for path in directory.glob(f".{name}.????????"):
        path.unlink(missing_ok=True)
