"""The clock of a file system. A shared file system has its own, which may differ from those of the hosts."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path


def clock_of(directory: Path, prefix: str) -> float:
    """Return the present time of the file system of `directory`, from a temporary file named with `prefix`.

    Returns this host's time if no file can be made.
    """
    try:
        with tempfile.NamedTemporaryFile(prefix=prefix, dir=directory) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
