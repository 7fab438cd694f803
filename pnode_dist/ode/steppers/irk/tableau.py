"""The coefficients of fully implicit Runge-Kutta methods, and the factors of a preconditioner of their stages.

J. C. Butcher: Implicit Runge-Kutta processes, Math. Comp. 18 (1964). E. Hairer, G. Wanner: Solving Ordinary
Differential Equations II, 2nd ed. (1996), sections IV.5 and IV.8. M. M. Rana, V. E. Howle, K. Long, A. Meek,
W. Milestone: A new block preconditioner for implicit Runge-Kutta methods for parabolic PDE problems, SIAM J. Sci.
Comput. 43 (2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np
import torch

from pnode_dist.petsc import vectors

Row = tuple[float, ...]


@dataclass(frozen=True)
class IrkTableau:
    """A method for M du/dt = f(t, u) whose matrix A has an inverse W.

    The stages solve sum_j W_ij M (Y_j - u) = h f(t + `nodes`_i h, Y_i), and the result is
    u + sum_j `ends`_j (Y_j - u). This form needs no inverse of M. A is `matrix`.
    """

    matrix: tuple[Row, ...]
    weights: Row
    nodes: Row

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.weights)

    @cached_property
    def inverse(self) -> torch.Tensor:
        """W `[stage, stage]`."""
        return _tensor(np.linalg.inv(self.matrix))

    @cached_property
    def row_sums(self) -> torch.Tensor:
        """The sums of the rows of W: the weights of u in the equations."""
        return self.inverse.sum(dim=1)

    @cached_property
    def ends_in_last_stage(self) -> bool:
        """True if the result is the last stage (stiffly accurate)."""
        return self.matrix[-1] == self.weights

    @cached_property
    def ends(self) -> torch.Tensor:
        """The weights of the stages in the result: b^T W, a unit vector if the result is the last stage."""
        if self.ends_in_last_stage:
            return _tensor(np.eye(self.stages)[-1])
        return _tensor(self.weights) @ self.inverse

    @cached_property
    def shift(self) -> float:
        """The geometric mean of the eigenvalues of W."""
        return float(np.linalg.det(self.inverse.numpy()) ** (1 / self.stages))

    @cached_property
    def triangle(self) -> torch.Tensor:
        """A lower triangle near W, with `shift` on the diagonal: one preconditioner serves all stages.

        With A = L D U, where L and U have unit diagonals, it is (L D)^-1 below the diagonal. GMRES takes about half as
        many iterations as with the diagonal alone.
        """
        lower, upper = np.eye(self.stages), np.array(self.matrix)
        for column in range(self.stages):
            for row in range(column + 1, self.stages):
                lower[row, column] = upper[row, column] / upper[column, column]
                upper[row] -= lower[row, column] * upper[column]
        inverse = np.linalg.inv(lower * upper.diagonal())
        return _tensor(np.tril(inverse, -1) + self.shift * np.eye(self.stages))

    def result(self, state: torch.Tensor, stages: torch.Tensor) -> torch.Tensor:
        """Return the state after the step from `stages`, whose first axis counts the stages."""
        if self.ends_in_last_stage:
            return stages[-1]
        return torch.add(state, torch.tensordot(self.ends, stages - state, dims=1))


def _tensor(entries: object) -> torch.Tensor:
    return torch.tensor(np.asarray(entries, dtype=float), dtype=vectors.scalar_dtype())


_R3, _R6, _R15 = sqrt(3.0), sqrt(6.0), sqrt(15.0)
IRK_TABLES = {
    "gauss4": IrkTableau(
        matrix=((1 / 4, 1 / 4 - _R3 / 6), (1 / 4 + _R3 / 6, 1 / 4)),
        weights=(1 / 2, 1 / 2),
        nodes=(1 / 2 - _R3 / 6, 1 / 2 + _R3 / 6),
    ),
    "gauss6": IrkTableau(
        matrix=(
            (5 / 36, 2 / 9 - _R15 / 15, 5 / 36 - _R15 / 30),
            (5 / 36 + _R15 / 24, 2 / 9, 5 / 36 - _R15 / 24),
            (5 / 36 + _R15 / 30, 2 / 9 + _R15 / 15, 5 / 36),
        ),
        weights=(5 / 18, 4 / 9, 5 / 18),
        nodes=(1 / 2 - _R15 / 10, 1 / 2, 1 / 2 + _R15 / 10),
    ),
    "radau3": IrkTableau(
        matrix=((5 / 12, -1 / 12), (3 / 4, 1 / 4)),
        weights=(3 / 4, 1 / 4),
        nodes=(1 / 3, 1.0),
    ),
    "radau5": IrkTableau(
        matrix=(
            (11 / 45 - 7 * _R6 / 360, 37 / 225 - 169 * _R6 / 1800, -2 / 225 + _R6 / 75),
            (37 / 225 + 169 * _R6 / 1800, 11 / 45 + 7 * _R6 / 360, -2 / 225 - _R6 / 75),
            (4 / 9 - _R6 / 36, 4 / 9 + _R6 / 36, 1 / 9),
        ),
        weights=(4 / 9 - _R6 / 36, 4 / 9 + _R6 / 36, 1 / 9),
        nodes=(2 / 5 - _R6 / 10, 2 / 5 + _R6 / 10, 1.0),
    ),
}
"""The methods by their names."""
