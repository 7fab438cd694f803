"""Long runs of the coarse equations with a closure, without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.partition.protocol import Partition

HOURS = 24.0


@dataclass(frozen=True)
class FreeRun:
    """The end of a free run.

    `samples` is the number of finite samples after the initial state. `blown_up` is the day of the first sample that
    is not finite; None: there is none.
    """

    samples: int
    blown_up: float | None


@torch.no_grad()
def free_run(
    solve: NeuralODE,
    initial: torch.Tensor,
    interval: float,
    samples: int,
    partition: Partition,
    on_sample: Callable[[int, torch.Tensor], None],
) -> FreeRun:
    """Solve from `initial` and call `on_sample(number, state)` for the samples 0 to `samples`, `interval` hours apart.

    Only one state is held. The run ends at the first state that is not finite on some rank; that one is not handed on.
    Collective on the partition's communicator.
    """
    state = initial
    on_sample(0, state)
    for number in range(1, samples + 1):
        state = solve(state, [0.0, interval])[-1]
        finite = bool(torch.isfinite(state).all())
        if not all(partition.comm.allgather(finite)):
            return FreeRun(number - 1, number * interval / HOURS)
        on_sample(number, state)
    return FreeRun(samples, None)
