"""Inverses of a matrix that a change of low rank was added to, by the formula of Sherman, Morrison and Woodbury."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from mpi4py import MPI

from pnode_dist.steady.conditions import sums

Apply = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LowRank:
    """The matrix factor A + sum_i left_i right_i^T for some A. Rows of `left` and `right` are this rank's parts."""

    comm: MPI.Comm
    factor: float
    left: torch.Tensor
    right: torch.Tensor

    def inverse(self, apply: Apply, transposed: bool) -> Apply:
        """Return the product with the inverse, or its transpose; `apply` is that with A^-1 or A^-T. Collective.

        With B = factor A, (B + L R^T)^-1 = B^-1 - Z (I + R^T Z)^-1 R^T B^-1, where Z = B^-1 L.
        """
        left, right = (self.right, self.left) if transposed else (self.left, self.right)
        solved = torch.stack([apply(row) for row in left]) / self.factor
        small = torch.eye(len(left), dtype=left.dtype) + sums(self.comm, right @ solved.T)

        def product(flat: torch.Tensor) -> torch.Tensor:
            first = apply(flat) / self.factor
            weights: torch.Tensor = torch.linalg.solve(small, sums(self.comm, right @ first))
            return first - weights @ solved

        return product
