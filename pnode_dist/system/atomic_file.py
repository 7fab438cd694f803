"""Files that are there as a whole or not at all, also after a crash."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], None], durable: bool = True) -> None:
    """Write a file, readable by its owner only, so that at any time the old one or the whole new one is there.

    `durable` also after the machine went down: the file has reached the disk when this returns.
    Raises `OSError` if it cannot be written; the old file is then left as it was.
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
    """Let what is in a file, or the names in a directory, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(directory: Path, name: str) -> None:
    """Remove what writers of the file `name` (a pattern) that were killed have left. No other may be writing it."""
    for path in directory.glob(f".{name}.????????"):
        path.unlink(missing_ok=True)
