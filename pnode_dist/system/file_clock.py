"""The clock by which a file system marks its files. A shared one has its own, and that of another host is a third."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path


def clock_of(directory: Path, prefix: str) -> float:
    """The time now by the file system of `directory`, told by a file whose name begins with `prefix`; it goes at once.

    Where none can be made it is this host's time.
    """
    try:
        with tempfile.NamedTemporaryFile(prefix=prefix, dir=directory) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
