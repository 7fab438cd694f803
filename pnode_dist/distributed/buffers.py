"""The memory of tensors as MPI buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the memory of a contiguous CPU tensor as bytes, for messages that copy data unchanged."""
    if tensor.numel() == 0:
        # A tensor without entries may have any strides.
        return np.empty(0, dtype=np.uint8)
    # A tensor of one entry counts as contiguous with any stride, and view(-1) would keep it.
    return tensor.detach().view(-1).as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


def check_movable(tensors: Sequence[torch.Tensor]) -> None:
    """Raise `NotImplementedError` for a tensor without values in memory, or a sparse one."""
    for tensor in tensors:
        if tensor.is_meta or tensor.layout != torch.strided:
            raise NotImplementedError(
                f"the mpi backend moves dense tensors, got one on {tensor.device} with layout {tensor.layout}"
            )


def check_dtypes(tensors: Sequence[torch.Tensor]) -> None:
    """Raise `TypeError` unless all tensors of one operation have the same dtype."""
    found = dict.fromkeys(tensor.dtype for tensor in tensors)
    if len(found) > 1:
        raise TypeError(f"tensors of {', '.join(map(str, found))} in one operation: must have one dtype")


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in contiguous memory of the host, without a graph: those of `tensor` itself if possible."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def store(target: torch.Tensor, values: torch.Tensor) -> None:
    """Write `values` to `target`, unless they are in its memory."""
    if target.device != values.device or values.data_ptr() != target.data_ptr():
        target.detach().copy_(values.view(target.shape))


def share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return True if two tensors are views of the same memory, whether their elements overlap or not."""
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the entries of all tensors, one tensor after the other, as a vector in memory of its own."""
    return torch.cat([tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1) for tensor in tensors])


def store_parts(targets: Sequence[torch.Tensor], values: torch.Tensor) -> None:
    """Write consecutive parts of the vector `values` to the tensors. Inverse of `flat`."""
    for target, part in zip(targets, torch.split(values, [target.numel() for target in targets]), strict=True):
        target.detach().copy_(part.view(target.shape))
