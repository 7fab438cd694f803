"""Robertson problem: learn stiff reactions from trajectories over seven decades of time, and forecast others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pnode_dist.problems.common.computed_problem import EnsembleProblem
from pnode_dist.problems.common.forecast_data import Samples, SplitData, Windows
from pnode_dist.problems.common.forecast_errors import mean_share, means_by_lead
from pnode_dist.problems.common.forecast_parts import Scaling
from pnode_dist.problems.robertson.comparison import FINELY, RIVAL, SolveOutcome, outcomes_of
from pnode_dist.problems.robertson.data import decades, fastest_rate, generate, range_of, sample_times
from pnode_dist.problems.robertson.model import LogTimeRate, RobertsonModel, right_hand_side
from pnode_dist.problems.robertson.physics import SPECIES
from pnode_dist.report.dataset_file import Variable

if TYPE_CHECKING:
    from pnode_dist.problems.robertson.config import RobertsonRun


class RobertsonProblem(EnsembleProblem):
    """Learn three stiff reactions over seven decades of time.

    The state of the solve is the concentrations, scaled to between 0 and 1. Its time is the decades since the start of
    a window. Errors are mean absolute errors of scaled concentrations.
    """

    config: RobertsonRun
    plots = "pnode_dist.problems.robertson.plots"
    model: RobertsonModel
    error = "mae"
    components = SPECIES

    def sample_times(self) -> Sequence[float]:
        """Return the times of the samples, evenly spaced in their logarithm."""
        return sample_times(self.config.problem)

    def clock(self, leads: int) -> Sequence[float]:
        """Return the solve times of windows of `leads` leads, in decades since their start."""
        return [number * decades(self.config.problem) for number in range(leads + 1)]

    def load_data(self) -> SplitData:
        """Compute all trajectories on every rank."""
        return self.split_data(*generate(self.config.problem))

    def build_scaling(self, learnt: Samples) -> Scaling:
        """Scale by the least concentrations of the training trajectories and their range."""
        return range_of(self.description.values)

    def build_right_hand_side(self) -> LogTimeRate:
        """Build the learnt rates, scaled to the fastest changes of the training trajectories."""
        scaling = self._parts.scaling
        assert scaling is not None
        states = scaling.states(torch.from_numpy(self.description.values))
        rate = fastest_rate(states, self.samples.times)
        return right_hand_side(self.config.model, rate, self.sample_times(), self.config.run.seed)

    def build_model(self, func: Any) -> RobertsonModel:
        """Build rollouts in the logarithm of time."""
        return RobertsonModel(self.build_solve(func), decades(self.config.problem))

    def baselines(self, batch: Windows) -> Mapping[str, torch.Tensor]:
        """Return persistence and the mean of the training trajectories at the same time."""
        learnt = self.samples.values[0, 1:]
        total = self.mesh.sum(learnt.sum(dim=1), over="state") / self.partition.global_shape[0]
        mean = total[:, None, None].expand_as(batch.targets)
        return {"persistence": batch.initial.expand_as(batch.targets), "training_mean": mean}

    def reported(self, error: torch.Tensor) -> torch.Tensor:
        """Return the errors of scaled concentrations unchanged."""
        return error

    def gradcheck_loss(self, batch: Windows) -> torch.Tensor:
        """Return the mean square error: it is smooth, unlike absolute values, as finite differences require."""
        return mean_share((self.model(batch) - batch.targets).square(), batch, self.mesh)

    def lead_time(self, batch: Windows, lead: int) -> dict[str, float]:
        """Return the time of a lead since the beginning of the reactions."""
        return {"time": batch.times[0][lead]}

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """Compute the errors of the model and of two simple forecasts; write `forecast.h5` and `report.png`.

        Each validation trajectory is forecast from its first sample to its last. `solves` compares the errors and costs
        of the trained solver, of steps that are 16 times finer, and of the rival, an explicit method with error
        control.
        """
        forecast, batch = self.rollouts(model)
        forecasts = {"model": forecast, **self.baselines(batch)}
        pursuits = outcomes_of(self.config, self.model, batch, self.dtype)
        figures = {
            "all_leads_from_1_0_0": {name: self._first_error(values, batch) for name, values in forecasts.items()},
            "solves": self._compared(pursuits, batch),
        }
        samples = self.config.problem.times
        variables = {
            f"steps_{name}": Variable(("time",), [*pursuit.steps, *[math.nan] * (samples - len(pursuit.steps))])
            for name, pursuit in pursuits.items()
        }
        variables[RIVAL] = self.stored(pursuits[RIVAL].states[1:], batch)
        return self.report(forecasts, batch, run_directory, figures, variables)

    def _first_error(self, rollout: torch.Tensor, batch: Windows) -> float:
        """Return the mean absolute scaled error of the first validation trajectory. Collective on the state ranks."""
        own = 1 if batch.samples.partition.comm.rank == 0 else 0
        first = (rollout - batch.targets).abs()[:, 0, :own]
        return self.mesh.sum(first.sum(), over="state").item() / (len(batch.targets) * len(SPECIES))

    def _compared(self, pursuits: Mapping[str, SolveOutcome], batch: Windows) -> list[dict[str, Any]]:
        """Return one row for each solve of the trained model. Collective on the state ranks.

        A row holds the cost on this rank, the time and reason of an early end, and the errors relative to the truth and
        to the solve with fine steps.
        """

        def error(states: torch.Tensor, truth: torch.Tensor) -> float | None:
            means = means_by_lead((states - truth[: len(states)]).abs(), batch, self.mesh)
            return means.mean().item() if len(states) else None

        fine = pursuits[FINELY].states[1:].double()
        rows = []
        for name, pursuit in pursuits.items():
            states, cost = pursuit.states[1:].double(), pursuit.cost
            rows.append(
                {
                    "solve": name,
                    "steps": cost.forward_steps,
                    "rejected": cost.rejected_steps,
                    "evaluations": cost.function_evaluations,
                    "newton_iterations": cost.newton_iterations,
                    "reached_time": self.sample_times()[pursuit.reached],
                    "mae": error(states, batch.targets),
                    "mae_to_fine_steps": error(states, fine),
                    "stopped": pursuit.stopped,
                }
            )
        return rows
