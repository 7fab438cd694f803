"""The rounding of output times: times that were rounded to a short floating type have its precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

DOUBLE = 2.0**-52
"""The relative rounding of times in double precision."""
# For each short type: the bits of its mantissa, and the exponent of its smallest normal number.
_SHORT_TYPES = ((11, -14), (24, -126))
_FEW_BITS = 3


def rounding_of(t: torch.Tensor | Sequence[float], times: tuple[float, ...]) -> float:
    """Return the relative rounding of the times: the spacing of numbers of their type above 1.

    The type is that of a tensor or an array. A list of Python numbers is taken to come from a short type if all of them
    are numbers of that type and some of them use nearly all of its bits. Numbers written by hand do not.
    """
    dtype: Any = getattr(t, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return max(torch.finfo(dtype).eps, DOUBLE) if dtype.is_floating_point else DOUBLE
    if dtype is not None:
        return max(float(np.finfo(dtype).eps), DOUBLE) if np.issubdtype(dtype, np.floating) else DOUBLE
    return _of_numbers(times)


@lru_cache(maxsize=64)
def _of_numbers(times: tuple[float, ...]) -> float:
    if all(time.is_integer() for time in times):
        return DOUBLE
    most = max(map(_bits, times))
    for bits, least in _SHORT_TYPES:
        if most <= bits and most > bits - _FEW_BITS and all(time == 0 or abs(time) >= 2.0**least for time in times):
            return 2.0 ** (1 - bits)
    return DOUBLE


def _bits(number: float) -> int:
    """Return the number of bits of a mantissa, from the first to the last one that is set."""
    mantissa = int(math.ldexp(math.frexp(abs(number))[0], 53))
    return mantissa.bit_length() - (mantissa & -mantissa).bit_length() + 1 if mantissa else 0
