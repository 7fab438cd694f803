"""The model of the semilinear problems: the linear part as it is, implicit, and convection learnt, explicit."""

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
    """-F(w)_x for the state w `[..., points_local, 1]`, F a residual stack of convolutions along the line.

    What is learnt is the flux F, which the equations have as w^2 / 2 of the same point; that it is differentiated, by
    central differences, keeps the mean of w. `factor` is what the difference of the fluxes of the two neighbours is
    multiplied with. F starts as a tenth of what torch's initialisation gives, so that the first solves stay near what
    the linear part makes of their initial states. Collective on the partition's communicator.
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
        """The term in the state's shape; it does not depend on `t`. Collective on the partition's communicator."""
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
    """The term that is learnt, computing in `dtype`, with the parameters that `seed` fixes. Not collective.

    States are in units of `scale`, on a line of `length`. The parameters are drawn in float64 before anything is
    rounded: every rank and every dtype starts from the same ones.
    """
    factor = -scale * partition.shape[0] / (2 * length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        term = LearntConvection(partition, model.channels, model.layers, model.kernel_size, model.activation, factor)
    return term.to(dtype)


class SemilinearModel(Rollouts):
    """Rollouts of windows by a solve for each number of windows, whose linear part is a matrix of that size.

    `term` is what is learnt, and `solve_of_size(count)` makes the solve of so many windows at once.
    """

    def __init__(self, term: nn.Module, solve_of_size: Callable[[int], NeuralODE]) -> None:
        super().__init__()
        self.term = term
        self._solve_of_size = solve_of_size
        # Not modules of this one: they all hold the same term, whose parameters count once.
        self._solves: dict[int, NeuralODE] = {}
        self._last_count: int | None = None

    @property
    def last_solve(self) -> SolveStatistics:
        """The counts of the last call."""
        return SolveStatistics() if self._last_count is None else self._solves[self._last_count].last_solve

    def solve_of(self, count: int) -> NeuralODE:
        """The solve of so many windows, made when it is first asked for."""
        if count not in self._solves:
            self._solves[count] = self._solve_of_size(count)
        self._last_count = count
        return self._solves[count]
