"""Robertson problem: learn stiff reactions from trajectories over seven decades of time, and forecast others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pnode_dist.problems.common.computed_problem import EnsembleProblem
from pnode_dist.problems.common.forecast_data import Samples, SplitData, Windows
from pnode_dist.problems.common.forecast_errors import mean_share
from pnode_dist.problems.common.forecast_parts import Scaling
from pnode_dist.problems.common.forecast_stream import Forecast, Row
from pnode_dist.problems.common.trainable import FORECAST
from pnode_dist.problems.robertson.comparison import RIVAL, Comparison, pursuits_of
from pnode_dist.problems.robertson.data import decades, fastest_rate, generate, range_of, sample_times
from pnode_dist.problems.robertson.model import LogTimeRate, RobertsonModel, right_hand_side
from pnode_dist.problems.robertson.physics import SPECIES
from pnode_dist.report.dataset_file import Later, Variable

if TYPE_CHECKING:
    from pnode_dist.distributed.mesh import Mesh
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

    def baselines(self, batch: Windows) -> Mapping[str, Forecast]:
        """Return persistence and the mean of the training trajectories at the same time."""

        def training_mean(lead: int) -> torch.Tensor:
            total = self.mesh.sum(self.samples.values[0, lead].sum(dim=0), over="state")
            return (total / self.partition.global_shape[0]).expand_as(batch.initial)

        return {"persistence": lambda lead: batch.initial, "training_mean": training_mean}

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
        batch = self.held_out_windows(torch.float64)
        forecasts, first = {"model": model, **self.baselines(batch)}, FirstErrors(batch, self.mesh)
        pursuits = pursuits_of(self.config, self.model, batch, self.dtype)
        compared = Comparison(pursuits, next(self.model.groups(batch)).times, batch)
        steps = Variable(("time",), Later((1 + batch.steps,)), dtype="f8")
        others = {**self.variables(batch), **{f"steps_{name}": steps for name in pursuits}}
        with self.create_file(run_directory / FORECAST, batch, (*forecasts, RIVAL), others) as file:
            compared.advance(file.write)
            for name, pursuit in pursuits.items():
                file.stream.write(f"steps_{name}", (slice(0, len(pursuit.steps)),), pursuit.steps)
            means = {
                name: self.judged(name, forecast, batch, [file.write, first.add]).means
                for name, forecast in forecasts.items()
            }
            self.write_truth(batch, file)
        figures = {"all_leads_from_1_0_0": first, "solves": compared.rows(self.sample_times(), self.mesh)}
        return self.illustrated(self.table(means, batch, figures), run_directory)


class FirstErrors:
    """The mean absolute scaled error of the first validation trajectory, over all leads, of each forecast."""

    def __init__(self, batch: Windows, mesh: Mesh) -> None:
        self._batch, self._mesh = batch, mesh
        self._owned = 1 if batch.samples.partition.comm.rank == 0 else 0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, row: Row) -> None:
        """Take the states of a forecast at one lead."""
        error = (row.states - self._batch.target(row.lead)).abs()[0, : self._owned]
        self._sums[name] = self._sums.get(name, torch.zeros(1, dtype=torch.float64)) + error.sum()

    def result(self) -> dict[str, float]:
        """Return the error by forecast. Collective on the state ranks."""
        count = self._batch.steps * len(SPECIES)
        return {name: self._mesh.sum(total, over="state").item() / count for name, total in self._sums.items()}
