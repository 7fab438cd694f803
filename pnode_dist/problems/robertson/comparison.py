"""Solves of the trained Robertson model: with the trained solver, with fine steps, and with an explicit method."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.errors import StepSizeError
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.problems.common.forecast_data import Windows
from pnode_dist.problems.common.solver import neural_ode
from pnode_dist.problems.robertson.model import RobertsonModel

if TYPE_CHECKING:
    from pnode_dist.problems.robertson.config import RobertsonRun

TRAINED, FINELY, RIVAL = "as_trained", "fine_steps", "rival"
_REFINEMENT = 16


@dataclass(frozen=True)
class SolveOutcome:
    """The result of a solve from output time to output time.

    `states` `[1 + reached, ...]` are the initial state and the states at the reached times. `steps` are the cumulative
    numbers of steps at these times. `cost` is the sum over all intervals. `stopped` is the reason for an early end, or
    None if the solve reached the last time.
    """

    states: torch.Tensor
    steps: tuple[int, ...]
    cost: SolveStatistics
    stopped: str | None

    @property
    def reached(self) -> int:
        """The index of the last reached time."""
        return len(self.steps) - 1


def solve_to_outputs(
    solve: NeuralODE, initial: torch.Tensor, times: Sequence[float], args: tuple[Any, ...], most_steps: int
) -> SolveOutcome:
    """Solve from each time to the next, until the last time or until `most_steps` or more steps are taken.

    A step size that becomes too small also ends the solve, without an error. Collective on the solve's partition.
    """
    states, steps, cost = [initial], [0], SolveStatistics()
    stopped = None
    for begin, end in pairwise(times):
        if steps[-1] >= most_steps:
            stopped = f"after {steps[-1]} steps"
            break
        try:
            with torch.no_grad():
                states.append(solve(states[-1], [begin, end], *args)[-1])
        except StepSizeError as error:
            stopped = str(error)
            break
        cost = cost + solve.last_solve
        steps.append(cost.forward_steps)
    return SolveOutcome(torch.stack(states), tuple(steps), cost, stopped)


def outcomes_of(
    config: RobertsonRun, model: RobertsonModel, batch: Windows, dtype: torch.dtype
) -> dict[str, SolveOutcome]:
    """Solve the batch with the configured solver, with its method and 16 steps per sample interval, and with the rival.

    Collective on the batch's partition.
    """
    solver, rival = config.solver, config.rival
    group = next(model.groups(batch))
    unbounded = dict.fromkeys(("pcoeff", "icoeff", "dcoeff", "first_step", "dt_min", "dt_max", "max_steps"))
    finely = {**unbounded, "step_size": model.decades / _REFINEMENT, "rtol": None, "atol": None}
    explicitly: dict[str, Any] = {
        **unbounded,
        "adaptor": "basic",
        "method": rival.method,
        "step_size": None,
        "rtol": rival.rtol,
        "atol": rival.atol,
        "preconditioner": "none",
        "petsc_options": {},
    }
    ways: dict[str, tuple[dict[str, Any], int]] = {
        TRAINED: ({}, sys.maxsize),
        FINELY: (finely, sys.maxsize),
        RIVAL: (explicitly, rival.steps),
    }
    found = {}
    for name, (changes, most_steps) in ways.items():
        way = config.model_copy(update={"solver": solver.model_copy(update=changes)})
        solve = neural_ode(way, model.solve.func, batch.samples.partition)
        found[name] = solve_to_outputs(solve, batch.initial.to(dtype), group.times, group.args, most_steps)
    return found
