"""Reductions of torch.distributed as MPI computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from pnode_dist.distributed.buffers import contiguous

_OPERATIONS = {
    "SUM": MPI.SUM,
    "AVG": MPI.SUM,
    "PREMUL_SUM": MPI.SUM,
    "PRODUCT": MPI.PROD,
    "MIN": MPI.MIN,
    "MAX": MPI.MAX,
    "BAND": MPI.BAND,
    "BOR": MPI.BOR,
    "BXOR": MPI.BXOR,
}
# A sum of booleans, which MPI reduces as bytes 0 and 1, must stay a boolean.
_OF_BOOLEANS = {"SUM": MPI.MAX, "PRODUCT": MPI.MIN}
_BITWISE = ("BAND", "BOR", "BXOR")


@dataclass(frozen=True)
class Reduction:
    """A reduction of tensors of one dtype: multiply by `factor`, reduce with `operation`, divide if it `averages`."""

    name: str
    operation: MPI.Op
    factor: float | None = None
    averages: bool = False

    def prepared(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return contiguous values of a type that MPI reduces: `tensor` itself if possible.

        Floats of fewer than 32 bits become float32, and booleans bytes.
        """
        values = contiguous(tensor)
        if _is_short_float(values.dtype):
            values = values.float()
        elif values.dtype == torch.bool:
            values = values.view(torch.uint8)
        return values if self.factor is None else values * self.factor

    def finished(self, total: torch.Tensor, ranks: int) -> torch.Tensor:
        """Return the result of the reduction over so many ranks. Changes `total`."""
        return total.div_(ranks) if self.averages else total


def reduction_of(given: Any, dtype: torch.dtype) -> Reduction:
    """Return the reduction by a `ReduceOp` of torch, or by its type, for tensors of `dtype`.

    Raises `NotImplementedError` for a reduction that is not defined for the dtype.
    """
    # The documented way to a factor, `ReduceOp.factor`, is younger than the oldest torch that is supported.
    operation: Any = dist.ReduceOp(given) if isinstance(given, dist.ReduceOp.RedOpType) else given
    kind, factor = operation.__getstate__()
    name = kind.name
    fractional = dtype.is_floating_point or dtype.is_complex
    fits = {"AVG": fractional, "PREMUL_SUM": fractional, "MIN": not dtype.is_complex, "MAX": not dtype.is_complex}
    fits |= dict.fromkeys(_BITWISE, not fractional)
    if name not in _OPERATIONS or not fits.get(name, True) or dtype == torch.complex32:
        raise NotImplementedError(f"the mpi backend does not reduce {dtype} with {name}")
    of_mpi = _OF_BOOLEANS.get(name, _OPERATIONS[name]) if dtype == torch.bool else _OPERATIONS[name]
    # The factor of a PREMUL_SUM is a number or a tensor with one entry.
    return Reduction(name, of_mpi, None if factor is None else float(factor), averages=name == "AVG")


def _is_short_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < 4
