"""Model of the semilinear problems: the known linear part, implicit, and a learnt convection, explicit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.exchange import halo
from pnode_dist.nn import Conv1d
from pnode_dist.nn.activation import ACTIVATIONS
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.forecast_model import Rollouts
from pnode_dist.problems.semilinear.config import SemilinearModelConfig

_FIRST_OUTPUT = 0.1


class LearntConvection(nn.Module):
    """The term -F(w)_x for the state w `[..., points_local, 1]`, with a residual stack F of convolutions on the line.

    The learnt function is the flux F, which is w^2 / 2 of the same point in the equations. Its derivative by central
    differences conserves the mean of w. `factor` multiplies the difference of the fluxes of the two neighbours. The
    output layer starts at a tenth of torch's initialisation, so that the first solves stay near the solutions of the
    linear part alone. Collective on the partition's communicator.
    """

    def __init__(
        self, partition: GridPartition, channels: int, layers: int, kernel_size: int, activation: str, factor: float
    ) -> None:
        super().__init__()
        self.partition = partition
        self.activation = ACTIVATIONS[activation]
        self.factor = factor
        self.hidden = nn.ModuleList(
            Conv1d(partition, before, channels, kernel_size, dtype=torch.float64)
            for before in [1, *[channels] * (layers - 2)]
        )
        self.output = Conv1d(partition, channels, 1, kernel_size, dtype=torch.float64)
        with torch.no_grad():
            for value in self.output.parameters():
                value.mul_(_FIRST_OUTPUT)

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return the term in the state's shape; `t` is unused. Collective on the partition's communicator."""
        x = state
        for number, layer in enumerate(self.hidden):
            y = self.activation(layer(x))
            x = y if number == 0 else x + y
        flux = halo(self.output(x), self.partition, 1)
        return self.factor * (flux[..., 2:, :] - flux[..., :-2, :])


def learnt_convection(
    partition: GridPartition,
    length: float,
    scale: float,
    model: SemilinearModelConfig,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LearntConvection:
    """Build the learnt term, which computes in `dtype`, with initial parameters determined by `seed`. Not collective.

    States are in units of `scale`, on a line of `length`. The parameters are drawn in float64 and then rounded to
    `dtype`, so that every rank and every dtype starts from the same values.
    """
    factor = -scale * partition.shape[0] / (2 * length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        term = LearntConvection(partition, model.channels, model.layers, model.kernel_size, model.activation, factor)
    return term.to(dtype)


class SemilinearModel(Rollouts):
    """Rollouts of windows, with one solve for each number of windows.

    The linear part of a solve is a matrix whose size depends on that number. `term` is the learnt term, and
    `solve_of_size(count)` builds the solve of `count` windows at once.
    """

    def __init__(self, term: nn.Module, solve_of_size: Callable[[int], NeuralODE]) -> None:
        super().__init__()
        self.term = term
        self._solve_of_size = solve_of_size
        # Not registered as submodules: all solves hold the same term, whose parameters must be counted once.
        self._solves: dict[int, NeuralODE] = {}
        self._last_count: int | None = None

    @property
    def last_solve(self) -> SolveStatistics:
        """The counts of the last call."""
        return SolveStatistics() if self._last_count is None else self._solves[self._last_count].last_solve

    def solve_of(self, count: int) -> NeuralODE:
        """Return the solve of `count` windows, built at the first call."""
        if count not in self._solves:
            self._solves[count] = self._solve_of_size(count)
        self._last_count = count
        return self._solves[count]
