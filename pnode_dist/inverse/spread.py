"""Forecasts with their uncertainty: an ensemble of solves from samples of a Laplace approximation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from mpi4py import MPI

from pnode_dist.errors import ConfigurationError, ConvergenceError
from pnode_dist.inverse.laplace import Laplace


@dataclass(frozen=True, eq=False)
class Spread:
    """The mean and the standard deviation of an ensemble of forecasts, this rank's part, float64.

    Both are `[time, *local_shape]` at `times`. `members` is the size of the ensemble.
    """

    times: tuple[float, ...]
    members: int
    mean: torch.Tensor = field(repr=False)
    deviation: torch.Tensor = field(repr=False)


def forecast_spread(approximation: Laplace, times: Sequence[float], members: int, seed: int = 0) -> Spread:
    """Solve from `members` samples of the controls; return mean and deviation of the states at ascending `times`.

    The samples depend on `seed` and global indices alone. Holds two states for each time, not the ensemble. Afterwards
    the parameters among the controls have their values at the minimum. Collective.
    Raises `ConfigurationError` for fewer than two members, and for times that `Inverse.forecast` refuses;
    `ConvergenceError` on all ranks for a sample whose forecast is not finite.
    """
    if members < 2:
        raise ConfigurationError(f"members = {members}: must be at least 2")
    problem = approximation.problem
    mean = squares = torch.zeros(())
    for number in range(members):
        states = problem.forecast(approximation.sample(seed, number), times).double()
        if not problem.comm.allreduce(bool(states.isfinite().all()), MPI.LAND):
            problem.assign(approximation.m)
            raise ConvergenceError(
                f"the forecast of sample {number} is not finite: the approximation is too wide for these equations"
            )
        # Welford's update: the difference of two large sums would lose digits.
        change = states - mean
        mean = mean + change / (number + 1)
        squares = squares + change * (states - mean)
    problem.assign(approximation.m)
    return Spread(tuple(map(float, times)), members, mean, (squares / (members - 1)).sqrt())
