"""The semilinear equations on a partitioned periodic line, and their initial states."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pnode_dist.exchange import halo
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.semilinear.config import LineEquation
from pnode_dist.problems.semilinear.periodic_line import (
    Stencil,
    combined,
    first_difference,
    fourth_difference,
    second_difference,
)


def linear_stencil(equation: LineEquation, points: int) -> Stencil:
    """Return the stencil of a u_xx + b u_xxxx on `points` points, by central differences of second order."""
    spacing = equation.length / points
    terms = [(equation.second, second_difference(spacing))]
    if equation.fourth:
        terms.append((equation.fourth, fourth_difference(spacing)))
    return combined(*terms)


def convection_stencil(equation: LineEquation, points: int) -> Stencil:
    """Return the stencil that maps u^2 to -u u_x = -(u^2 / 2)_x.

    Central differences conserve the mean of u.
    """
    return combined((-0.5, first_difference(equation.length / points)))


class Convection(nn.Module):
    """The right-hand side -u u_x = -(u^2 / 2)_x of a partitioned state, with the stencil of `convection_stencil`.

    A state is `[..., points_local, 1]` of any floating type, in units of `scale` (1: the units of the equation).
    """

    def __init__(self, partition: GridPartition, length: float, scale: float = 1.0) -> None:
        super().__init__()
        self.partition = partition
        self.factor = -scale * partition.shape[0] / (4 * length)

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return the convection in the state's shape; `t` is unused. Collective on the partition's communicator."""
        squares = halo(state, self.partition, 1).square()
        return self.factor * (squares[..., 2:, :] - squares[..., :-2, :])


def initial_state(equation: LineEquation, points: int, seed: int, number: int = 0) -> npt.NDArray[np.float64]:
    """Return the whole initial state `[points]` determined by `seed` and `number`.

    It is the sum of the equation's longest waves, each with a random amplitude and phase, scaled to a root mean square
    of 1. Grids of different spacing sample the same function. Not collective.
    """
    generator = np.random.default_rng([seed, number])
    cosines, sines = generator.standard_normal((2, equation.waves))
    angles = 2 * np.pi * np.arange(1, equation.waves + 1)[:, None] * np.arange(points) / points
    waves = cosines @ np.cos(angles) + sines @ np.sin(angles)
    state: npt.NDArray[np.float64] = waves / np.sqrt(0.5 * (cosines @ cosines + sines @ sines))
    return state
