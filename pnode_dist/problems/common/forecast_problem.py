"""The base of problems that forecast trajectories: data, right-hand side and partition are given, all else follows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from pnode_dist.config.definition import ProblemDefinition
from pnode_dist.config.tables import Config, EvaluationConfig
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import gradient_refusal, resolve
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition import protocol
from pnode_dist.problems.common.batches import check_replicas, shared
from pnode_dist.problems.common.forecast_data import (
    Samples,
    Start,
    Windows,
    windows,
)
from pnode_dist.problems.common.forecast_errors import Judged, LeadMeans, mean_share
from pnode_dist.problems.common.forecast_file import TRUTH, ForecastFile, create_forecast
from pnode_dist.problems.common.forecast_model import ForecastModel, Rollouts
from pnode_dist.problems.common.forecast_stream import Forecast, Reduction, Row, each_lead
from pnode_dist.problems.common.served_forecast import served_forecasts, source_of
from pnode_dist.problems.common.solver import check_checkpoint
from pnode_dist.problems.common.trainable import FORECAST
from pnode_dist.problems.common.trajectory_problem import TrajectoryProblem
from pnode_dist.report.dataset_file import Variable
from pnode_dist.train.served_model import ServedModel
from pnode_dist.verify.gradcheck import GradcheckCase

_FORMER = {
    "mean_penalties": "judged(name, forecast, batch)",
    "rollouts": "judged(name, forecast, batch)",
    "write": "variables(batch) for further variables of the file, or create_file for another file",
}
"""Methods of earlier versions, which held whole forecasts, and what takes their place."""


class ForecastProblem(TrajectoryProblem):
    """A forecast of trajectories, of which a subclass gives three things.

    - `build_partition()`: the distribution of a state over the state ranks, any of `pnode_dist`'s partitions.
    - `load_data()`: a `TrajectoryData`, a generator of one for each trajectory, a `SplitData`, an xarray
      object, or gridded files as `pnode_dist.open_gridded` opens them.
    - `build_right_hand_side()`: du/dt = f(t, u), a module or function; `u` is `[window, *partition.local_shape]`.

    `self.partition`, `self.samples` (training data) and `self.config` may be used in all of them, in any order that is
    not a circle. Everything else has a default: loss (mean square error in standard deviations), batches, validation,
    baselines, rollouts, table of leads, `forecast.h5`, picture, and the cases of `plan` and `gradcheck`.

    `normalised`: samples, batches and rollouts are states with mean 0 and deviation 1, of which `physical` makes values
    in the data's units; `build_scaling` chooses other units. `time_dependent`: f is given the data's times, and each
    window is solved by itself; otherwise the start of a window is at time 0. `error`: the mean that is the loss and
    that is reported, root mean square (`rmse`) or mean absolute (`mae`).
    """

    EvaluationConfig: ClassVar[type[Any]] = EvaluationConfig
    plots = "pnode_dist.problems.common.forecast_plot"
    time_dependent: ClassVar[bool] = False
    error: ClassVar[Literal["rmse", "mae"]] = "rmse"
    _must_define: ClassVar[tuple[str, ...]] = ("build_partition", "load_data", "build_right_hand_side")

    @classmethod
    def problem_definition(cls) -> ProblemDefinition:
        """The definition by which a configuration finds this class. Raises `ConfigurationError` if it is incomplete."""
        for name, now in _FORMER.items():
            if cls._defines(name):
                raise ConfigurationError(f"{cls.__name__}.{name}: is not called: must be {now}")
        if len(signature(cls.figures).parameters) != 2:
            raise ConfigurationError(
                f"{cls.__name__}.figures: must take self and batch: a figure of forecasts is an object with methods "
                "add(name, row) and result()"
            )
        return super().problem_definition()

    def build_right_hand_side(self) -> Any:
        """f of du/dt = f(t, u), with parameters drawn from the run's seed. Collective on the state ranks."""
        raise NotImplementedError

    def __init__(self, config: Config, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__(config, mesh, dtype)
        self._check_data()
        _ = self.model

    def _check_data(self) -> None:
        window: int = self.settings.window
        samples = self.samples
        if window >= samples.length:
            raise ConfigurationError(
                f"[problem] window = {window}: must be at most {samples.length - 1}, one less than the samples of a "
                "trajectory to learn from"
            )
        self._check_sizes(len(samples.starts(window)), (samples.times - samples.times[0])[: window + 1].tolist())

    def _check_sizes(self, windows: int, times: Sequence[float]) -> None:
        """Check leads, replicas and budget against so many training windows, each solved for `times`."""
        _ = self.leads
        check_replicas(self.config, self.mesh, windows)
        share = math.ceil(self.config.training.batch_size / self.mesh.data_replicas)
        values = (1 if self._solves_one_by_one else share) * protocol.count(self.partition.local_shape)
        check_checkpoint(self.config, values, self.dtype, times, self.partition.comm, self._solves)

    @property
    def _solves_one_by_one(self) -> bool:
        return self.time_dependent or not self.samples.is_regular

    @property
    def _solves(self) -> int:
        """Solves of a batch that are alive together."""
        return math.ceil(self.config.training.batch_size / self.mesh.data_replicas) if self._solves_one_by_one else 1

    # Model

    @cached_property
    def model(self) -> Rollouts:
        """The rollouts of windows, `[lead, window, *local_shape]`, by the solve of the right-hand side."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed)
            func = self.build_right_hand_side()
        if isinstance(func, nn.Module):
            func = func.to(self.dtype)
        if not callable(func):
            raise ConfigurationError(
                f"{self._of('build_right_hand_side')}: returned {type(func).__name__}, which cannot be called as "
                "f(t, u)"
            )
        if not any(value.requires_grad for value in (func.parameters() if isinstance(func, nn.Module) else ())):
            raise ConfigurationError(
                f"{self._of('build_right_hand_side')}: there is no parameter to learn: must be a torch.nn.Module with "
                "parameters that require a gradient"
            )
        return self.build_model(func)

    def build_model(self, func: Any) -> Rollouts:
        """The rollouts of windows with the right-hand side `func`: the model, or what it is compared with."""
        return ForecastModel(self.build_solve(func), self.time_dependent)

    def build_solve(self, func: Any) -> NeuralODE:
        """The configured solve of `func`."""
        return self.neural_ode(func, self.partition, trajectory=self.config.trajectory.build(self._solves))

    # Training

    def batches(self, epoch: int, done: int = 0) -> Iterator[Windows]:
        """This replica's training windows of an epoch, shuffled. No window touches the samples that are held out."""
        window: int = self.settings.window
        for share in shared(self.samples.starts(window), self.config, self.mesh, epoch, done):
            yield windows(self.samples, share, window, self.dtype)

    def loss(self, model: nn.Module, batch: Windows) -> torch.Tensor:
        """This rank's share of the mean error over all that is not missing, in standard deviations or as scaled."""
        return mean_share(self.penalty(self._in_loss(model(batch) - batch.targets)), batch, self.mesh)

    def penalty(self, error: torch.Tensor) -> torch.Tensor:
        """The function of each error whose mean is the loss: squares or absolute values, as `error` says."""
        return error.square() if self.error == "rmse" else error.abs()

    def _in_loss(self, error: torch.Tensor) -> torch.Tensor:
        return error if self._parts.scaling is not None else error / self.moments[1].to(error.dtype)

    # Forecasts

    def held_out_windows(self, dtype: torch.dtype) -> Windows:
        """The windows that are forecast: whole trajectories, or of a single one all that reach the longest lead."""
        held_out = self.held_out
        steps = max(self.leads) if self.is_split_in_time else held_out.length - 1
        starts: list[Start] = [start for start in held_out.starts(steps) if self.is_split_in_time or start[1] == 0]
        if not starts:
            raise ConfigurationError(f"{self._of('load_data')}: no state that is held out is complete at its start")
        return windows(held_out, starts, steps, dtype)

    def baselines(self, batch: Windows) -> Mapping[str, Forecast]:
        """Forecasts that the model is to beat: functions of the lead, models, or tensors like `batch.targets`."""
        mean = self.moments[0].expand_as(batch.initial)
        return {"persistence": lambda lead: batch.initial, "training_mean": lambda lead: mean}

    def reported(self, error: torch.Tensor) -> torch.Tensor:
        """Errors `[window, *local_shape]` in `units`, or standard deviations where the entries' units differ."""
        units = self.description.units
        if not isinstance(units, str) and len(set(units)) > 1:
            return error / self.moments[1]
        scaling = self._parts.scaling
        return error if scaling is None else error * scaling.scale

    def figure(self, mean: torch.Tensor) -> float:
        """The reported error of a mean square or absolute error."""
        return math.sqrt(mean.item()) if self.error == "rmse" else mean.item()

    def validation(self, model: nn.Module) -> dict[str, float]:
        """The errors of forecasts of what is held out: over all leads, and at each evaluated lead."""
        means = self.judged("model", model, self.held_out_windows(torch.float64)).means
        return {
            f"validation_{self.error}": self.figure(means.mean()),
            **{f"lead_{lead}": self.figure(means[lead - 1]) for lead in self.leads},
        }

    def judged(
        self,
        name: str,
        forecast: Forecast,
        batch: Windows,
        takers: Sequence[Callable[[str, Row], None]] = (),
        size: int | None = None,
    ) -> Judged:
        """Compute a forecast lead by lead, add up its errors, and give each part of it to the `takers`.

        A model is solved for `size` windows at once, by default those of a training batch. Collective on the state
        ranks. Raises `ConfigurationError` for a forecast of another shape than the targets.
        """
        found = LeadMeans(batch)
        if isinstance(forecast, torch.Tensor) and len(forecast) != batch.steps:
            raise ConfigurationError(f"{self._of('baselines')}: {name!r} has {len(forecast)} leads, not {batch.steps}")

        def take(row: Row) -> None:
            target = batch.target(row.lead)[list(row.starts)]
            if row.states.shape != target.shape:
                raise ConfigurationError(
                    f"{self._of('baselines')}: {name!r} has shape {tuple(row.states.shape)} at a lead: must be "
                    f"{tuple(target.shape)}"
                )
            found.add(row.lead, row.starts, self.penalty(self.reported(row.states - target)))
            for taker in takers:
                taker(name, row)

        seconds = each_lead(forecast, batch, size or self.config.training.batch_size, self.dtype, take)
        return Judged(found.result(self.mesh), seconds)

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """The errors of the model and of the baselines at each lead; writes `forecast.h5` and `report.png`."""
        batch = self.held_out_windows(torch.float64)
        return self.report({"model": model, **self.baselines(batch)}, batch, run_directory, self.figures(batch))

    def report(
        self,
        forecasts: Mapping[str, Forecast],
        batch: Windows,
        run_directory: Path,
        figures: Mapping[str, Any],
        variables: Mapping[str, Variable] | None = None,
    ) -> dict[str, Any]:
        """The table of an evaluation, with its files written: further `figures`, and `variables` of the file.

        No forecast is held whole: errors, figures and file are made lead by lead. Collective on the world.
        """
        takers = [figure.add for figure in figures.values() if isinstance(figure, Reduction)]
        others = {**self.variables(batch), **(variables or {})}
        with self.create_file(run_directory / FORECAST, batch, forecasts, others) as file:
            means = {
                name: self.judged(name, forecast, batch, [file.write, *takers]).means
                for name, forecast in forecasts.items()
            }
            self.write_truth(batch, file)
        return self.illustrated(self.table(means, batch, figures), run_directory)

    def write_truth(self, batch: Windows, file: ForecastFile) -> None:
        """Write what the forecasts were to be. Collective on the state ranks."""
        each_lead(batch.target, batch, len(batch.starts), self.dtype, partial(file.write, TRUTH))

    def table(self, means: Mapping[str, torch.Tensor], batch: Windows, figures: Mapping[str, Any]) -> dict[str, Any]:
        """The table of an evaluation: mean errors `[lead]` by forecast, further `figures`. Collective on the world."""
        rows = [
            {
                "lead": lead,
                **self.lead_time(batch, lead),
                **{name: self.figure(mean[lead - 1]) for name, mean in means.items()},
            }
            for lead in self.leads
        ]
        found = {name: one.result() if isinstance(one, Reduction) else one for name, one in figures.items()}
        return {
            "problem": self.name,
            "units": self.units,
            **found,
            "training": _described(self.samples),
            "validation": f"{len(batch.starts)} forecasts of {batch.steps} samples",
            self.error: rows,
            "all_leads": {name: self.figure(mean.mean()) for name, mean in means.items()},
        }

    def figures(self, batch: Windows) -> Mapping[str, Any]:
        """Further figures of an evaluation by name, or objects that compute them from the forecasts (`Reduction`).

        Collective on the world.
        """
        return {}

    def lead_time(self, batch: Windows, lead: int) -> dict[str, float]:
        """The column of the table that gives a lead as a time."""
        return {"time": batch.times[0][lead] - batch.times[0][0]}

    def variables(self, batch: Windows) -> Mapping[str, Variable]:
        """Further variables of `forecast.h5`. Collective on the world."""
        return {}

    def create_file(
        self, path: Path, batch: Windows, forecasts: Collection[str], others: Mapping[str, Variable]
    ) -> ForecastFile:
        """Create the file of forecasts of these names, which are then written lead by lead, with `others`.

        Collective on the world.
        """
        return create_forecast(path, batch, self.description, self.units, self.physical, self.mesh, others)

    # Cases

    def served(self) -> Sequence[ServedModel]:
        """The forecast of what is held out, as a function of the parameters and of the initial state, and others."""
        starts = self.held_out_windows(torch.float64).starts
        refusal = gradient_refusal(resolve(self.config.solver.method))
        source = source_of(self._parts, starts, self.leads, self.dtype)
        return *served_forecasts(self.model, source, self.physical, refusal), *super().served()

    def solve_case(self) -> SolveCase:
        """The first solve of the first training batch."""
        return self.model.first_case(next(self.batches(1)))

    def gradcheck_case(self) -> GradcheckCase:
        """The training loss of some windows, as a function of their initial states."""
        batch = windows(self.samples, self.gradcheck_starts(), self.settings.window, self.dtype)

        def loss(state: torch.Tensor) -> torch.Tensor:
            return self.gradcheck_loss(dataclasses.replace(batch, initial=state))

        return GradcheckCase(
            batch.initial.clone().requires_grad_(), loss, tuple(self.model.parameters()), self.partition
        )

    def gradcheck_loss(self, batch: Windows) -> torch.Tensor:
        """This rank's share of the loss that the gradient check differentiates. Collective on the world."""
        return self.loss(self.model, batch)

    def gradcheck_starts(self) -> list[Start]:
        """The starts of the windows of `gradcheck_case`: the first one."""
        return self.samples.starts(self.settings.window)[:1]


def _described(samples: Samples) -> str:
    several = f"{samples.count} trajectories of " if samples.count > 1 else ""
    first, last = samples.times[0].item(), samples.times[-1].item()
    return f"{several}{samples.length} samples, times {first:g} to {last:g}"
