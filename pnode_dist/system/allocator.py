"""Settings of the C library for freed memory."""

from __future__ import annotations

import ctypes
import os

# glibc's malloc.h; above 32 MiB older versions refuse a threshold.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_THRESHOLD, _MMAP_THRESHOLD = 2**30, 2**25


def keep_freed_memory() -> bool:
    """Keep up to 1 GiB of freed memory in this process for later allocations. Returns True on success.

    The graphs of a step are freed by its adjoint, and the next step makes new ones. By default glibc returns their
    memory to the system each time, and every page costs a fault at its next use: a tenth of the time or more for
    tensors of some hundred kilobytes. Blocks of more than 32 MiB are always returned.

    Does nothing if the environment sets the allocator (`MALLOC_*_`, `GLIBC_TUNABLES`), or with another C library.
    """
    if any(name == "GLIBC_TUNABLES" or (name.startswith("MALLOC_") and name.endswith("_")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
