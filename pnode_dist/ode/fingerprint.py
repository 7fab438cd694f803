"""Fingerprints of tensors: one number each, by which a recomputed result is compared with the first one.

A fingerprint is a sum of all entries with fixed weights between 1/2 and 3/2. Unlike a hash of the bits it tells by how
much two results differ; unlike a plain sum or a norm it changes where only conserved quantities stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch

_ROW = 4096
_GOLDEN = 0.6180339887498949


@lru_cache(maxsize=64)
def _weights(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The weights of `count` entries: 1/2 plus the fractional parts of multiples of the golden ratio."""
    numbers = torch.arange(1, count + 1, dtype=torch.float64)
    return (0.5 + (numbers * _GOLDEN).frac()).to(device, dtype)


def _flat(part: torch.Tensor) -> torch.Tensor:
    flat = part.detach().reshape(-1)
    return flat if flat.dtype is torch.float64 else flat.double()


def _weighted_sum(flat: torch.Tensor) -> torch.Tensor:
    count = flat.numel()
    if count <= _ROW:
        return flat.dot(_weights(count, flat.dtype, flat.device))
    rows = count // _ROW
    total = _weighted_sum(torch.mv(flat[: rows * _ROW].view(rows, _ROW), _weights(_ROW, flat.dtype, flat.device)))
    rest = flat[rows * _ROW :]
    return total + rest.dot(_weights(rest.numel(), flat.dtype, flat.device))


def fingerprint(parts: Iterable[torch.Tensor]) -> float:
    """The fingerprint of some tensors together. On a device this waits for them."""
    total = 0.0
    for number, part in enumerate(parts):
        # Parts that change places are told apart.
        total += (1.0 + 0.25 * number) * _weighted_sum(_flat(part)).item()
    return total


def magnitude(parts: Iterable[torch.Tensor]) -> float:
    """The root of the sum of the squares of all entries, which is about the size that a fingerprint can have."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(_flat(part))) ** 2 for part in parts))
