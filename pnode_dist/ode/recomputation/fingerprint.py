"""Fingerprints of tensors: one number each, by which a recomputed result is compared with the first one.

A fingerprint is a sum of all entries with fixed weights between 1/2 and 3/2. Unlike a hash of the bits it tells by how
much two results differ; unlike a plain sum or a norm it changes where only conserved quantities stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

_ROW = 4096
_GOLDEN = 0.6180339887498949


@lru_cache(maxsize=64)
def _weights(count: int, device: torch.device) -> torch.Tensor:
    """The weights of `count` entries: 1/2 plus the fractional parts of multiples of the golden ratio."""
    numbers = torch.arange(1, count + 1, dtype=torch.float64)
    return (0.5 + (numbers * _GOLDEN).frac()).to(device)


@lru_cache(maxsize=64)
def _host_weights(shape: torch.Size) -> NDArray[np.float64]:
    """The weights of a small tensor on the host."""
    return _weights(shape.numel(), torch.device("cpu")).reshape(shape).numpy()


def _flat(part: torch.Tensor) -> torch.Tensor:
    """The entries in a row, in double precision."""
    return part.detach().double().reshape(-1)


def _weighted_sum(flat: torch.Tensor) -> torch.Tensor:
    count = flat.numel()
    if count <= _ROW:
        return flat.dot(_weights(count, flat.device))
    rows = count // _ROW
    total = _weighted_sum(torch.mv(flat[: rows * _ROW].view(rows, _ROW), _weights(_ROW, flat.device)))
    rest = flat[rows * _ROW :]
    return total + rest.dot(_weights(rest.numel(), flat.device))


def _of_part(part: torch.Tensor) -> float:
    if part.numel() > _ROW or not part.is_cpu:
        return float(_weighted_sum(_flat(part)).item())
    # NumPy's product of small arrays takes half the time of torch's, and a small stage takes little longer.
    if part.requires_grad:
        part = part.detach()
    if part.dtype is not torch.float64:
        part = part.double()
    return float(np.vdot(part.numpy(), _host_weights(part.shape)))


def fingerprint(parts: Sequence[torch.Tensor]) -> float:
    """The fingerprint of some tensors together. On a device this waits for them."""
    if len(parts) == 1:
        return _of_part(parts[0])
    # Parts that change places are told apart.
    return sum((1.0 + 0.25 * number) * _of_part(part) for number, part in enumerate(parts))


def magnitude(parts: Iterable[torch.Tensor]) -> float:
    """The root of the sum of the squares of all entries, which is about the size that a fingerprint can have."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(_flat(part))) ** 2 for part in parts))
