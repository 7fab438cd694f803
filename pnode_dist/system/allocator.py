"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import os

# glibc's malloc.h; above 32 MiB older versions refuse a threshold.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_THRESHOLD, _MMAP_THRESHOLD = 2**30, 2**25


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB of freed memory for what it allocates next; returns whether it does.

    The graphs of a step are freed by its adjoint and made anew by the next one. As glibc is set up, their memory goes
    back to the system each time, and every page of it costs a fault when it is used again: a tenth of the time and
    more, if tensors have some hundred kilobytes. Blocks of more than 32 MiB are given back in any case.

    Does nothing where the environment has settings of its own for the allocator (`MALLOC_*_`, `GLIBC_TUNABLES`), or
    where the C library is another one.
    """
    if any(name == "GLIBC_TUNABLES" or (name.startswith("MALLOC_") and name.endswith("_")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
