"""Fingerprints of tensors: one number for each result, to compare a recomputed result with the first one.

A fingerprint is the sum of all entries with fixed weights between 1/2 and 3/2. Unlike a hash it measures the size of a
difference. Unlike a plain sum or a norm it also changes if a conserved quantity stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

_SMALL = 4096
# Some BLAS, such as Debian's reference one, sum a row in order: their rounding error grows with its length.
_ROW = 256
_GOLDEN = 0.6180339887498949


@lru_cache(maxsize=64)
def _weights(count: int, device: torch.device) -> torch.Tensor:
    """Return the weights of `count` entries: 1/2 plus the fractional parts of multiples of the golden ratio."""
    numbers = torch.arange(1, count + 1, dtype=torch.float64)
    return (0.5 + (numbers * _GOLDEN).frac()).to(device)


@lru_cache(maxsize=64)
def _host_weights(shape: torch.Size) -> NDArray[np.float64]:
    """Return the weights of a small tensor on the host."""
    return _weights(shape.numel(), torch.device("cpu")).reshape(shape).numpy()


def _flat(part: torch.Tensor) -> torch.Tensor:
    """Return the entries as a flat tensor in double precision."""
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
    if part.numel() > _SMALL or not part.is_cpu:
        return float(_weighted_sum(_flat(part)).item())
    # For small arrays NumPy's product takes half the time of torch's. A small stage takes little longer.
    if part.requires_grad:
        part = part.detach()
    if part.dtype is not torch.float64:
        part = part.double()
    values, weights = part.numpy(), _host_weights(part.shape)
    return float(np.vdot(values, weights) if values.size <= _ROW else (values * weights).sum())


def fingerprint(parts: Sequence[torch.Tensor]) -> float:
    """Return the fingerprint of several tensors together. Synchronises with their device."""
    if len(parts) == 1:
        return _of_part(parts[0])
    # Different factors detect parts that are exchanged.
    return sum((1.0 + 0.25 * number) * _of_part(part) for number, part in enumerate(parts))


def magnitude(parts: Iterable[torch.Tensor]) -> float:
    """Return the Euclidean norm of all entries, about the size that a fingerprint can have."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(_flat(part))) ** 2 for part in parts))
