"""Search for the largest stable step of a method by trial solves."""

from __future__ import annotations

import math

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.partition.protocol import Partition

STEPS = 300
_FIRST_STEPS = 30
TOLERANCE = 0.02
_NOISE = 1e-3
_GROWTH = 2.0
_LARGEST_RANGE = 60


def largest_stable_step(
    func: Function,
    state: torch.Tensor,
    method: str,
    partition: Partition,
    guess: float,
) -> float:
    """Find the largest stable step, to a few hundredths. Collective on the partition's communicator.

    `state` is `[samples, *partition.local_shape]`. A second state adds noise of a thousandth of its size, which excites
    every growing mode. A step is stable if 300 steps at most double the distance between the two solutions. `func`
    takes both states at once, so twice as many samples: one solve of both costs hardly more than a solve of one.

    The search starts at `guess`, halves or doubles it until it has a stable and an unstable step, and then bisects the
    logarithm. The result is 2 % less than the largest step found, because 300 steps do not reveal a growth of some
    thousandths per step. Raises `ArithmeticError` if halving or doubling does not find such a pair.
    """
    noisy = state + _NOISE * _noise(state, partition)
    limit = _GROWTH * _largest(noisy - state, partition)

    def stable(step: float) -> bool:
        solve = NeuralODE(func, method=method, step_size=step, partition=partition)
        ends = torch.cat([state, noisy])
        # Most unstable steps diverge within a few steps.
        for steps in (_FIRST_STEPS, STEPS - _FIRST_STEPS):
            with torch.no_grad():
                ends = solve(ends, [0.0, steps * step])[-1]
            end, noisy_end = ends.chunk(2)
            if _largest(noisy_end - end, partition) > limit:
                return False
        return True

    low = high = guess
    for _ in range(_LARGEST_RANGE):
        if stable(low):
            break
        low, high = low / 2, low
    else:
        raise ArithmeticError(f"{method} is not stable with steps of {low:g}")
    for _ in range(_LARGEST_RANGE):
        if high > low and not stable(high):
            break
        low, high = high, 2 * high
    else:
        raise ArithmeticError(f"{method} is stable with steps of {high:g}")
    while high > (1 + TOLERANCE) * low:
        middle = math.sqrt(low * high)
        if stable(middle):
            low = middle
        else:
            high = middle
    return low / (1 + TOLERANCE)


def _noise(state: torch.Tensor, partition: Partition) -> torch.Tensor:
    """Return noise as large as the state, the same at every number of ranks."""
    whole = np.random.default_rng(0).standard_normal(partition.global_shape)
    own = torch.from_numpy(whole[partition.owned_slices(partition.comm.rank)])
    return (own * _largest(state, partition)).to(state.dtype)


def _largest(state: torch.Tensor, partition: Partition) -> float:
    """Return the largest absolute value over all ranks, or infinity if a value is not finite."""
    own = state.abs().max().item() if state.numel() else 0.0
    return float(partition.comm.allreduce(own if math.isfinite(own) else math.inf, MPI.MAX))
