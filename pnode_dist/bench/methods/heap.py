"""The memory that this process has in use, to the byte, and its peak during computations with tensors.

The figures are the C library's, by whom torch's tensors, PETSc's vectors and NumPy's arrays are allocated alike. Unlike
resident memory they depend neither on what was freed before nor on the size of pages: all runs have the same peak.
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
"""A peak may be higher than was seen by this share of it."""


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
    """All that was allocated and not freed. Raises `ConfigurationError` where the C library does not say."""
    info = _mallinfo()()
    return int(info.uordblks + info.hblkhd)


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered: `bytes` is the most memory in use after any of torch's operations, of backward passes too.

    The C library counts by walking through all that is free: it is asked where results since then could make a
    new peak, by some kilobytes at least, and else every so many operations, as others than torch allocate too.
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
    """Without the cyclic garbage collector, whose moment is chance, after all garbage is gone.

    Within another such block that takes little time: what was there before the outer one is not looked at again.
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
