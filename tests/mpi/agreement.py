"""What all ranks must have in common."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from mpi4py import MPI


def assert_same_on_all_ranks(tensors: Iterable[torch.Tensor | None]) -> None:
    """Every rank has the same tensors, bit for bit, and there is at least one. Collective on the world."""
    values = [None if tensor is None else tensor.detach().numpy() for tensor in tensors]
    assert values
    assert all(value is not None for value in values)
    for theirs in MPI.COMM_WORLD.allgather(values):
        assert all(np.array_equal(a, b) for a, b in zip(values, theirs, strict=True))
