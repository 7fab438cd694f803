"""Solves of the trained Robertson model: with the trained solver, with fine steps, and with an explicit method."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import StepSizeError
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.problems.common.forecast_data import Windows
from pnode_dist.problems.common.forecast_errors import LeadMeans
from pnode_dist.problems.common.forecast_stream import Row
from pnode_dist.problems.common.solver import neural_ode
from pnode_dist.problems.robertson.model import RobertsonModel

if TYPE_CHECKING:
    from pnode_dist.problems.robertson.config import RobertsonRun

TRAINED, FINELY, RIVAL = "as_trained", "fine_steps", "rival"
_REFINEMENT = 16


class Pursuit:
    """A solve that advances from output time to output time, until the last one or until it takes too many steps.

    `steps` are the cumulative numbers of steps at the reached times, and `cost` the sum over all intervals. `stopped`
    is the reason for an early end: `most_steps` steps or more, or a step size that becomes too small; None: there was
    none.
    """

    def __init__(self, solve: NeuralODE, initial: torch.Tensor, args: tuple[Any, ...], most_steps: int) -> None:
        self._solve, self._state, self._args, self._most_steps = solve, initial, args, most_steps
        self.steps, self.cost = [0], SolveStatistics()
        self.stopped: str | None = None

    @property
    def reached(self) -> int:
        """The index of the last reached time."""
        return len(self.steps) - 1

    def advance(self, begin: float, end: float) -> torch.Tensor | None:
        """Return the state at `end`, or None after an early end. Collective on the solve's partition."""
        if self.stopped is None and self.steps[-1] >= self._most_steps:
            self.stopped = f"after {self.steps[-1]} steps"
        if self.stopped is not None:
            return None
        try:
            with torch.no_grad():
                self._state = self._solve(self._state, [begin, end], *self._args)[-1]
        except StepSizeError as error:
            self.stopped = str(error)
            return None
        self.cost = self.cost + self._solve.last_solve
        self.steps.append(self.cost.forward_steps)
        return self._state


def pursuits_of(config: RobertsonRun, model: RobertsonModel, batch: Windows, dtype: torch.dtype) -> dict[str, Pursuit]:
    """Return solves of the batch: as configured, with that method and 16 steps per sample interval, and by the rival.

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
        found[name] = Pursuit(solve, batch.initial.to(dtype), group.args, most_steps)
    return found


class Comparison:
    """The errors of some solves that advance together, relative to the truth and to the solve with fine steps."""

    def __init__(self, pursuits: Mapping[str, Pursuit], times: Sequence[float], batch: Windows) -> None:
        self.pursuits, self._times, self._batch = pursuits, times, batch
        self._to_truth = {name: LeadMeans(batch) for name in pursuits}
        self._to_fine = {name: LeadMeans(batch) for name in pursuits}

    def advance(self, take: Callable[[str, Row], None]) -> None:
        """Advance all solves to the last time, and give each state to `take`. Collective on the batch's partition."""
        every = range(len(self._batch.starts))
        for lead, (begin, end) in enumerate(pairwise(self._times), start=1):
            states = {name: pursuit.advance(begin, end) for name, pursuit in self.pursuits.items()}
            truth, fine = self._batch.target(lead), states[FINELY]
            for name, reached in states.items():
                if reached is None:
                    continue
                state = reached.double()
                self._to_truth[name].add(lead, every, (state - truth).abs())
                if fine is not None:
                    self._to_fine[name].add(lead, every, (state - fine.double()).abs())
                take(name, Row(lead, every, state))

    def rows(self, sample_times: Sequence[float], mesh: Mesh) -> list[dict[str, Any]]:
        """Return a row for each solve: cost on this rank, time and reason of its end, mean absolute errors.

        Collective on the state ranks.
        """
        return [
            {
                "solve": name,
                "steps": pursuit.cost.forward_steps,
                "rejected": pursuit.cost.rejected_steps,
                "evaluations": pursuit.cost.function_evaluations,
                "newton_iterations": pursuit.cost.newton_iterations,
                "reached_time": sample_times[pursuit.reached],
                "mae": _mean(self._to_truth[name], mesh),
                "mae_to_fine_steps": _mean(self._to_fine[name], mesh),
                "stopped": pursuit.stopped,
            }
            for name, pursuit in self.pursuits.items()
        ]


def _mean(means: LeadMeans, mesh: Mesh) -> float | None:
    """Return the mean over the reached leads, None if there are none. Collective on the state ranks."""
    found = means.result(mesh)
    return found.mean().item() if len(found) else None
