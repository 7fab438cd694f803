"""Gradient methods compared by `pnode-dist bench methods`.

Names are those of the methods' papers and of `CheckpointBudget.keep`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from pnode_dist.bench.methods.baselines import Aca, Anode, Continuous, Naive, State
from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.ode.odeint import NeuralODE

_AMPLE = "64GiB"

MakeBlock = Callable[[nn.Module, str, int], nn.Module]
"""Makes the block u(0) -> u(1) from f, a solver and a number of steps."""


@dataclass(frozen=True)
class GradientMethod:
    """A gradient method. `reverse_accurate`: its gradient is that of the steps. `ours`: implemented by this project."""

    name: str
    block: MakeBlock
    reverse_accurate: bool = True
    ours: bool = True


class Solved(nn.Module):
    """Block solved by this project. `checkpoint_bytes` is the size of a checkpoint of its last state."""

    def __init__(self, func: nn.Module, method: str, steps: int, trajectory: CheckpointBudget) -> None:
        super().__init__()
        self.node = NeuralODE(func, method=method, step_size=1 / steps, trajectory=trajectory, last_only=True)

    def forward(self, state: State) -> State:
        """Return u(1)."""
        assert self.node.trajectory is not None
        parts = state if isinstance(state, tuple) else (state,)
        found: State = self.node(state, (0.0, 1.0))
        stored = self.node.trajectory.slot_dtype(np.dtype(str(parts[0].dtype).removeprefix("torch.")))
        self.checkpoint_bytes = sum(part.numel() for part in parts) * stored.itemsize
        return found


def solved(trajectory: Callable[[], CheckpointBudget]) -> MakeBlock:
    """Return a maker of blocks solved by this project, each with its own budget."""
    return lambda func, method, steps: Solved(func, method, steps, trajectory())


GRADIENT_METHODS = {
    gradient_method.name: gradient_method
    for gradient_method in (
        GradientMethod("NODE-cont", Continuous, reverse_accurate=False, ours=False),
        GradientMethod("NODE-naive", Naive, ours=False),
        GradientMethod("ANODE", Anode, ours=False),
        GradientMethod("ACA", Aca, ours=False),
        GradientMethod("solution", solved(lambda: CheckpointBudget(ram=_AMPLE, keep="solution"))),
        GradientMethod("stages", solved(lambda: CheckpointBudget(ram=_AMPLE, keep="stages"))),
        GradientMethod("graph", solved(lambda: CheckpointBudget(ram=_AMPLE, keep="graph"))),
        # Two states in memory, the other states on disk.
        GradientMethod(
            "spilled",
            solved(lambda: CheckpointBudget(ram_slots=2, disk="1GiB", keep="solution", schedule="multistage")),
        ),
    )
}
"""All gradient methods except `auto`, whose budgets follow from the memory of the others."""


def recomputed_steps(block: nn.Module) -> int:
    """Return the number of steps that the last backward pass of a block recomputed."""
    again = 0
    for module in block.modules():
        if isinstance(module, NeuralODE):
            again += module.last_solve.recomputed_steps
        elif isinstance(module, Naive):
            again += module.steps_again
    return again
