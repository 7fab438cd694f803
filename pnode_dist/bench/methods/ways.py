"""The gradient methods that `pnode-dist bench methods` compares.

They have the names of their papers, and those of `CheckpointBudget.keep`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from pnode_dist.bench.methods.baselines import Aca, Anode, Continuous, Naive, State
from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.ode.odeint import NeuralODE

_AMPLE = "64GiB"

MakeBlock = Callable[[nn.Module, str, int], nn.Module]
"""Makes of f, a method and a number of steps the block u(0) -> u(1)."""


@dataclass(frozen=True)
class Way:
    """A way to a gradient. `reverse_accurate`: it is that of the steps; `ours`: this project's."""

    name: str
    block: MakeBlock
    reverse_accurate: bool = True
    ours: bool = True


class Solved(nn.Module):
    """A block that this project solves."""

    def __init__(self, func: nn.Module, method: str, steps: int, trajectory: CheckpointBudget) -> None:
        super().__init__()
        self.node = NeuralODE(func, method=method, step_size=1 / steps, trajectory=trajectory, last_only=True)

    def forward(self, state: State) -> State:
        """u(1)."""
        found: State = self.node(state, (0.0, 1.0))
        return found


def solved(trajectory: Callable[[], CheckpointBudget]) -> MakeBlock:
    """Blocks of this project, each with a budget of its own."""
    return lambda func, method, steps: Solved(func, method, steps, trajectory())


WAYS = {
    way.name: way
    for way in (
        Way("NODE-cont", Continuous, reverse_accurate=False, ours=False),
        Way("NODE-naive", Naive, ours=False),
        Way("ANODE", Anode, ours=False),
        Way("ACA", Aca, ours=False),
        Way("solution", solved(lambda: CheckpointBudget(ram=_AMPLE, keep="solution"))),
        Way("stages", solved(lambda: CheckpointBudget(ram=_AMPLE, keep="stages"))),
        Way("graph", solved(lambda: CheckpointBudget(ram=_AMPLE, keep="graph"))),
        # Two states in memory, the others on disk.
        Way(
            "spilled",
            solved(lambda: CheckpointBudget(ram_slots=2, disk="1GiB", keep="solution", schedule="multistage")),
        ),
    )
}
"""All of them, but for `auto`, whose budgets follow from what the others take."""


def steps_run_again(block: nn.Module) -> int:
    """Return the number of steps that the last backward pass of a block recomputed."""
    again = 0
    for module in block.modules():
        if isinstance(module, NeuralODE):
            again += module.last_solve.recomputed_steps
        elif isinstance(module, Naive):
            again += module.steps_again
    return again
