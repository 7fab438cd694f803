"""Memory in use by this process, to the byte, and its peak during computations with tensors.

The values come from the C library, which allocates torch tensors, PETSc vectors and NumPy arrays alike. Unlike resident
memory they depend neither on earlier frees nor on the page size, so all runs have the same peak.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pnode_dist.errors import ConfigurationError

_MOST_UNASKED = 256
RESOLUTION = 2e-4
"""Relative resolution of a peak: the true peak may exceed the measured one by this share."""


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@cache
def _mallinfo() -> Callable[[], Any]:
    try:
        function = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        raise ConfigurationError("memory is measured by mallinfo2 of glibc 2.33 or newer, which is not here") from None
    function.restype = _Mallinfo
    found: Callable[[], Any] = function
    return found


def bytes_in_use() -> int:
    """Return the bytes allocated and not freed. Raises `ConfigurationError` if the C library does not report them."""
    info = _mallinfo()()
    return int(info.uordblks + info.hblkhd)


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that records in `bytes` the most memory in use after any torch operation, backward passes included.

    A query of the C library walks through all free memory and is slow. It runs only if the results since the last query
    could make a new peak, beyond the resolution. It also runs after a fixed number of operations, because code outside
    torch allocates too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self._bound = 0
        self._unasked = _MOST_UNASKED

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            parts = result if isinstance(result, tuple | list) else (result,)
            self._bound += sum(part.numel() * part.itemsize for part in parts if isinstance(part, torch.Tensor))
            self._unasked += 1
            if self._bound > self.bytes * (1 + RESOLUTION) or self._unasked > _MOST_UNASKED:
                self._bound, self._unasked = bytes_in_use(), 0
                self.bytes = max(self.bytes, self._bound)
        return result


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect all garbage, then disable the cyclic garbage collector, whose timing is arbitrary.

    A nested block is fast: objects from before the outer block are not scanned again.
    """
    gc.collect()
    outermost = gc.isenabled()
    if outermost:
        gc.disable()
        gc.freeze()
    try:
        yield
    finally:
        if outermost:
            gc.unfreeze()
            gc.enable()
