"""The largest step of a method with which a solution stays bounded, found by trying."""

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
    """The largest step, to a few hundredths, that is stable. Collective on the partition's communicator.

    `state` is `[samples, *partition.local_shape]`. 300 steps from it and from the same state with a thousandth of
    noise, in which there is whatever can grow, must not lead to more than twice their distance. `func` is of both at
    once, of twice as many samples: one solve for two costs hardly more than for one. The search begins at `guess`: it
    halves or doubles until it has one step that is stable and one that is not, and goes on by bisection of the
    logarithm. What comes back is 2 % less than what was found, because 300 steps do not show a growth of some
    thousandths in each. Raises `ArithmeticError` where halving or doubling has no end.
    """
    noisy = state + _NOISE * _noise(state, partition)
    limit = _GROWTH * _largest(noisy - state, partition)

    def stable(step: float) -> bool:
        solve = NeuralODE(func, method=method, step_size=step, partition=partition)
        ends = torch.cat([state, noisy])
        # Most steps that are too long show it soon.
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
    """The same at every number of ranks, as large as the state."""
    whole = np.random.default_rng(0).standard_normal(partition.global_shape)
    own = torch.from_numpy(whole[partition.owned_slices(partition.comm.rank)])
    return (own * _largest(state, partition)).to(state.dtype)


def _largest(state: torch.Tensor, partition: Partition) -> float:
    """The largest absolute value over all ranks, infinite where one is not finite."""
    own = state.abs().max().item() if state.numel() else 0.0
    return float(partition.comm.allreduce(own if math.isfinite(own) else math.inf, MPI.MAX))
