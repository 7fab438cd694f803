"""The base of problems that forecast trajectories: data, right-hand side and partition are given, all else follows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import nn

from pnode_dist.config.tables import Config, EvaluationConfig
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import gradient_refusal, resolve
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition import protocol
from pnode_dist.partition.protocol import Partition
from pnode_dist.problems.common.batches import check_replicas, shared
from pnode_dist.problems.common.forecast_data import (
    Samples,
    SplitData,
    Start,
    TrajectoryData,
    Windows,
    joined,
    samples_of,
    windows,
)
from pnode_dist.problems.common.forecast_errors import mean_share, means_by_lead
from pnode_dist.problems.common.forecast_file import write_forecast
from pnode_dist.problems.common.forecast_model import ForecastModel, Rollouts
from pnode_dist.problems.common.forecast_parts import Parts, Scaling, moments, split
from pnode_dist.problems.common.served_forecast import served_forecasts, source_of
from pnode_dist.problems.common.solver import check_checkpoint
from pnode_dist.problems.common.tables import ForecastTable
from pnode_dist.problems.common.trainable import FORECAST, TrainableProblem
from pnode_dist.report.dataset_file import Variable
from pnode_dist.train.served_model import ServedModel
from pnode_dist.verify.gradcheck import GradcheckCase


class ForecastProblem(TrainableProblem):
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

    ProblemConfig: ClassVar[type[Any]] = ForecastTable
    EvaluationConfig: ClassVar[type[Any]] = EvaluationConfig
    normalised: ClassVar[bool] = False
    plots = "pnode_dist.problems.common.forecast_plot"
    time_dependent: ClassVar[bool] = False
    error: ClassVar[Literal["rmse", "mae"]] = "rmse"
    _must_define: ClassVar[tuple[str, ...]] = ("build_partition", "load_data", "build_right_hand_side")

    def build_partition(self) -> Partition:
        """The distribution of a state over the state ranks. Collective on the state ranks."""
        raise NotImplementedError

    def load_data(self) -> Any:
        """The trajectories, see the class. Collective on the world."""
        raise NotImplementedError

    def build_right_hand_side(self) -> Any:
        """f of du/dt = f(t, u), with parameters drawn from the run's seed. Collective on the state ranks."""
        raise NotImplementedError

    def __init__(self, config: Config, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__(config, mesh, dtype)
        self._check_data()
        _ = self.model

    # Data

    @classmethod
    def _problem_table(cls) -> type[Any]:
        """The class of the table `[problem]`, with the keys of every forecast."""
        table = cls.ProblemConfig
        if isinstance(table, type) and issubclass(table, BaseModel) and not issubclass(table, ForecastTable):
            return type(
                table.__name__, (table, ForecastTable), {"__module__": table.__module__, "__doc__": table.__doc__}
            )
        return table

    @cached_property
    def partition(self) -> Partition:
        """The distribution of a state over the state ranks."""
        found: Any = self.build_partition()
        if not hasattr(found, "owned_slices"):
            raise ConfigurationError(f"{self._of('build_partition')}: returned {type(found).__name__}, not a partition")
        given: Partition = found
        return given

    @cached_property
    def data(self) -> TrajectoryData | SplitData:
        """The trajectories as `load_data` gave them."""
        found: Any = self.load_data()
        if isinstance(found, Iterator):
            return joined(found, self._of("load_data"))
        return found if isinstance(found, TrajectoryData | SplitData) else self.from_other(found)

    def from_other(self, data: Any) -> TrajectoryData:
        """The trajectories in what `load_data` returned, where that is an array or an xarray object."""
        module = type(data).__module__
        if module.partition(".")[0] == "xarray" or module.endswith("common.gridded"):
            from pnode_dist.problems.common.xarray_data import trajectory_of

            given: TrajectoryData = trajectory_of(data, self.partition, self._of("load_data"))
            return given
        if hasattr(data, "__array__"):
            return TrajectoryData(data)
        raise ConfigurationError(
            f"{self._of('load_data')}: returned {type(data).__name__}: must be a TrajectoryData, a SplitData, an "
            "array, an xarray object, or a generator of TrajectoryData"
        )

    @property
    def description(self) -> TrajectoryData:
        """The data's names, units and coordinates."""
        return self.data.training if isinstance(self.data, SplitData) else self.data

    @property
    def units(self) -> str:  # type: ignore[override]
        """The units of the errors; none where entries have different units, whose errors are in standard deviations."""
        units = self.description.units
        return units if isinstance(units, str) else (units[0] if len(set(units)) == 1 else "")

    def validation_partition(self) -> Partition:
        """The distribution of the trajectories that are held out, where `load_data` splits them. Default: the same."""
        return self.partition

    @property
    def missing(self) -> str:
        """`[problem] missing`, where the table has that key."""
        return getattr(self.settings, "missing", "refuse")

    @cached_property
    def _parts(self) -> Parts:
        source = self._of("load_data")

        def found(data: TrajectoryData, partition: Partition) -> Samples:
            return samples_of(data, partition, self.mesh, source, self.missing)

        if isinstance(self.data, SplitData):
            training = found(self.data.training, self.partition)
            parts = Parts(training, found(self.data.validation, self.validation_partition()), in_time=False)
        else:
            parts = split(found(self.data, self.partition), self.settings.validation, self.settings.window)
        return parts.scaled(self.build_scaling(parts.training))

    def build_scaling(self, learnt: Samples) -> Scaling | None:
        """The units of the states that are solved for; None: those of the data. Collective on the world.

        `learnt` are the training samples in the data's units. Default: mean and standard deviation if `normalised`.
        """
        return Scaling(*moments(learnt, self.mesh)) if self.normalised else None

    @property
    def samples(self) -> Samples:
        """This rank's part of the training samples, in the units that are solved for."""
        return self._parts.training

    @property
    def held_out(self) -> Samples:
        """This rank's part of the samples for validation, in the units that are solved for."""
        return self._parts.held_out

    @property
    def is_split_in_time(self) -> bool:
        """True if the validation samples are the last times of the only trajectory."""
        return self._parts.in_time

    def physical(self, states: torch.Tensor) -> torch.Tensor:
        """States in the data's units, in float64."""
        scaling = self._parts.scaling
        return states.double() if scaling is None else scaling.physical(states)

    @cached_property
    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel over `samples`, float64."""
        return moments(self.samples, self.mesh)

    @cached_property
    def leads(self) -> tuple[int, ...]:
        """The evaluated leads in samples: those of `[evaluation] leads`, of its default those that fit."""
        most, reason = self._longest_lead
        evaluation: Any = self.config.evaluation
        leads: tuple[int, ...] = evaluation.leads
        if max(leads) > most and "leads" not in evaluation.model_fields_set:
            return tuple(lead for lead in leads if lead <= most) or (most,)
        if max(leads) > most:
            raise ConfigurationError(f"[evaluation] leads = {list(leads)}: must be at most {most}, {reason}")
        return leads

    @property
    def _longest_lead(self) -> tuple[int, str]:
        """The longest lead that can be evaluated, and why."""
        return self.held_out.length - 1, "the samples that are held out after the first start"

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

    def rollouts(self, model: nn.Module) -> tuple[torch.Tensor, Windows]:
        """Forecasts `[lead, start, *local_shape]` of what is held out, and what they are to be, both in float64."""
        batch, size = self.held_out_windows(torch.float64), self.config.training.batch_size
        steps = len(batch.targets)
        parts = [
            model(windows(batch.samples, batch.starts[first : first + size], steps, self.dtype)).detach().double()
            for first in range(0, len(batch.starts), size)
        ]
        return torch.cat(parts, dim=1), batch

    def baselines(self, batch: Windows) -> Mapping[str, torch.Tensor]:
        """Forecasts that the model is to beat, shaped like the targets of `batch`."""
        return {
            "persistence": batch.initial.expand_as(batch.targets),
            "training_mean": self.moments[0].expand_as(batch.targets),
        }

    def reported(self, error: torch.Tensor) -> torch.Tensor:
        """Errors of states in `units`: those of the data, or standard deviations where the entries' units differ."""
        units = self.description.units
        if not isinstance(units, str) and len(set(units)) > 1:
            return error / self.moments[1]
        scaling = self._parts.scaling
        return error if scaling is None else error * scaling.scale

    def mean_penalties(self, forecast: torch.Tensor, batch: Windows) -> torch.Tensor:
        """The mean square or absolute error of each lead `[lead]`, in `units`. Collective on the state ranks."""
        penalties = self.penalty(self.reported(forecast - batch.targets[: len(forecast)]))
        return means_by_lead(penalties, batch, self.mesh)

    def figure(self, mean: torch.Tensor) -> float:
        """The reported error of a mean square or absolute error."""
        return math.sqrt(mean.item()) if self.error == "rmse" else mean.item()

    def validation(self, model: nn.Module) -> dict[str, float]:
        """The errors of forecasts of what is held out: over all leads, and at each evaluated lead."""
        forecast, batch = self.rollouts(model)
        means = self.mean_penalties(forecast, batch)
        return {
            f"validation_{self.error}": self.figure(means.mean()),
            **{f"lead_{lead}": self.figure(means[lead - 1]) for lead in self.leads},
        }

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """The errors of the model and of the baselines at each lead; writes `forecast.h5` and `report.png`."""
        forecast, batch = self.rollouts(model)
        forecasts = {"model": forecast, **self.baselines(batch)}
        return self.report(forecasts, batch, run_directory, self.figures(forecast, batch))

    def report(
        self,
        forecasts: Mapping[str, torch.Tensor],
        batch: Windows,
        run_directory: Path,
        figures: Mapping[str, Any],
        variables: Mapping[str, Variable] | None = None,
    ) -> dict[str, Any]:
        """The table of an evaluation, with its files written: further `figures`, and `variables` of the file.

        Collective on the world.
        """
        means = {name: self.mean_penalties(value, batch) for name, value in forecasts.items()}
        rows = [
            {
                "lead": lead,
                **self.lead_time(batch, lead),
                **{name: self.figure(mean[lead - 1]) for name, mean in means.items()},
            }
            for lead in self.leads
        ]
        result = {
            "problem": self.name,
            "units": self.units,
            **figures,
            "training": _described(self.samples),
            "validation": f"{len(batch.starts)} forecasts of {len(batch.targets)} samples",
            self.error: rows,
            "all_leads": {name: self.figure(mean.mean()) for name, mean in means.items()},
        }
        self.write(run_directory / FORECAST, forecasts, batch, variables or {})
        return self.illustrated(result, run_directory)

    def figures(self, forecast: torch.Tensor, batch: Windows) -> dict[str, Any]:
        """Further figures of an evaluation, by name. Collective on the world."""
        return {}

    def lead_time(self, batch: Windows, lead: int) -> dict[str, float]:
        """The column of the table that gives a lead as a time."""
        return {"time": batch.times[0][lead] - batch.times[0][0]}

    def write(
        self,
        path: Path,
        forecasts: Mapping[str, torch.Tensor],
        batch: Windows,
        variables: Mapping[str, Variable],
    ) -> None:
        """Write `forecast.h5`, with further `variables`. Collective on the world."""
        physical = dataclasses.replace(
            batch, initial=self.physical(batch.initial), targets=self.physical(batch.targets)
        )
        forecast = self.physical(forecasts["model"])
        write_forecast(path, forecast, physical, self.description, self.units, self.mesh, variables)

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

    def _of(self, method: str) -> str:
        return f"{type(self).__name__}.{method}"


def _described(samples: Samples) -> str:
    several = f"{samples.count} trajectories of " if samples.count > 1 else ""
    first, last = samples.times[0].item(), samples.times[-1].item()
    return f"{several}{samples.length} samples, times {first:g} to {last:g}"
