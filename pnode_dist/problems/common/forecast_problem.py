"""The base of problems that forecast trajectories: data, right-hand side and partition are given, all else follows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import nn

from pnode_dist.config.definition import ProblemTable
from pnode_dist.config.tables import Config, Count, EvaluationConfig
from pnode_dist.distributed.gradients import share_of_mean
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
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
    moments,
    samples_of,
    windows,
)
from pnode_dist.problems.common.forecast_file import FORECAST, write_forecast
from pnode_dist.problems.common.forecast_model import ForecastModel
from pnode_dist.problems.common.solver import check_checkpoint
from pnode_dist.problems.common.trainable import TrainableProblem
from pnode_dist.report.picture import draw
from pnode_dist.verify.gradcheck import GradcheckCase

REPORT = "report.png"


class ForecastTable(ProblemTable):
    """Base class of the table `[problem]` of a forecast."""

    window: Count = 1
    """Samples ahead of its start that a training window reaches."""
    validation: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Trajectories held out for validation, the last ones; of a single trajectory its last times. Default: a fifth."""
    missing: Literal["refuse", "mask"] = "refuse"
    """Whether values that are not a number are refused, or left out of the loss and of all errors."""


class ForecastProblem(TrainableProblem):
    """A forecast of trajectories, of which a subclass gives three things.

    - `build_partition()`: the distribution of a state over the state ranks, any of `pnode_dist`'s partitions.
    - `load_data()`: a `TrajectoryData`, a generator of one for each trajectory, a `SplitData`, an xarray
      object, or gridded files as `pnode_dist.open_gridded` opens them.
    - `build_right_hand_side()`: du/dt = f(t, u), a module or function; `u` is `[window, *partition.local_shape]`.

    `self.partition`, `self.samples` (training data) and `self.config` may be used in all of them, in any order that is
    not a circle. Everything else has a default: loss (mean square error in standard deviations), batches, validation,
    baselines, rollouts, table of leads, `forecast.h5`, picture, and the cases of `plan` and `gradcheck`.

    `normalised`: f is given states with mean 0 and deviation 1. `time_dependent`: f is given the data's times, and each
    window is solved by itself; otherwise the start of a window is at time 0.
    """

    ProblemConfig: ClassVar[type[Any]] = ForecastTable
    EvaluationConfig: ClassVar[type[Any]] = EvaluationConfig
    normalised: ClassVar[bool] = False
    time_dependent: ClassVar[bool] = False
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

    @cached_property
    def _parts(self) -> tuple[Samples, Samples, bool]:
        """Training and validation samples, and whether they are split in time."""
        source, missing = self._of("load_data"), self.settings.missing
        if isinstance(self.data, SplitData):
            return (
                samples_of(self.data.training, self.partition, self.mesh, source, missing),
                samples_of(self.data.validation, self.validation_partition(), self.mesh, source, missing),
                False,
            )
        whole = samples_of(self.data, self.partition, self.mesh, source, missing)
        in_time = whole.count == 1
        total = whole.length if in_time else whole.count
        held_out = self.settings.validation
        held_out = max(total // 5, 1) if held_out is None else held_out
        least = self.settings.window + 1 if in_time else 1
        if held_out > total - least:
            what = "times" if in_time else "trajectories"
            raise ConfigurationError(
                f"[problem] validation = {held_out}: must be at most {total - least}, which leaves {least} of the "
                f"{total} {what} to learn from"
            )
        learnt = total - held_out
        if in_time:
            # The last training time is the first start of a forecast.
            return whole.part(0, learnt), whole.part(learnt - 1, total), True
        return (
            dataclasses.replace(whole, values=whole.values[:learnt], present=_first(whole.present, learnt)),
            dataclasses.replace(whole, values=whole.values[learnt:], present=_rest(whole.present, learnt)),
            False,
        )

    @property
    def samples(self) -> Samples:
        """This rank's part of the training samples."""
        return self._parts[0]

    @property
    def held_out(self) -> Samples:
        """This rank's part of the samples for validation."""
        return self._parts[1]

    @property
    def is_split_in_time(self) -> bool:
        """Whether the validation samples are the last times of the only trajectory."""
        return self._parts[2]

    @cached_property
    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel over the training samples, float64."""
        return moments(self.samples, self.mesh)

    @cached_property
    def leads(self) -> tuple[int, ...]:
        """The evaluated leads in samples: those of `[evaluation] leads`, of its default those that fit."""
        most = self.held_out.length - 1
        evaluation: Any = self.config.evaluation
        leads: tuple[int, ...] = evaluation.leads
        if max(leads) > most and "leads" not in evaluation.model_fields_set:
            return tuple(lead for lead in leads if lead <= most) or (most,)
        if max(leads) > most:
            raise ConfigurationError(
                f"[evaluation] leads = {list(leads)}: must be at most {most}, the samples that are held out after the "
                "first start"
            )
        return leads

    def _check_data(self) -> None:
        window: int = self.settings.window
        samples = self.samples
        if window >= samples.length:
            raise ConfigurationError(
                f"[problem] window = {window}: must be at most {samples.length - 1}, one less than the samples of a "
                "trajectory to learn from"
            )
        _ = self.leads
        check_replicas(self.config, self.mesh, len(samples.starts(window)))
        share = math.ceil(self.config.training.batch_size / self.mesh.data_replicas)
        values = (1 if self._solves_one_by_one else share) * protocol.count(self.partition.local_shape)
        times = samples.times[: window + 1] - samples.times[0]
        check_checkpoint(self.config, values, times.tolist(), self.partition.comm, self._solves)

    @property
    def _solves_one_by_one(self) -> bool:
        return self.time_dependent or not self.samples.is_regular

    @property
    def _solves(self) -> int:
        """Solves of a batch that are alive together."""
        return math.ceil(self.config.training.batch_size / self.mesh.data_replicas) if self._solves_one_by_one else 1

    # Model

    @cached_property
    def model(self) -> nn.Module:
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
        trajectory = self.config.trajectory.build(self._solves)
        mean, deviation = self.moments if self.normalised else (None, None)
        return ForecastModel(
            self.neural_ode(func, self.partition, trajectory=trajectory), self.time_dependent, mean, deviation
        )

    # Training

    def batches(self, epoch: int, done: int = 0) -> Iterator[Windows]:
        """This replica's training windows of an epoch, shuffled. No window touches the samples that are held out."""
        window: int = self.settings.window
        for share in shared(self.samples.starts(window), self.config, self.mesh, epoch, done):
            yield windows(self.samples, share, window, self.dtype)

    def loss(self, model: nn.Module, batch: Windows) -> torch.Tensor:
        """This rank's share of the mean square error, in standard deviations, over all that is not missing."""
        error: torch.Tensor = (model(batch) - batch.targets) / self.moments[1].to(batch.targets.dtype)
        if batch.weights is None:
            count = math.prod(batch.targets.shape[:2]) * math.prod(batch.samples.partition.global_shape)
            return share_of_mean(error.square().sum(), count, self.mesh)
        total = self.mesh.sum(batch.weights.double().sum(), over="state")
        return share_of_mean((error.square() * batch.weights).sum(), int(total.item()), self.mesh)

    # Forecasts

    def rollouts(self, model: nn.Module) -> tuple[torch.Tensor, Windows]:
        """Forecasts `[lead, start, *local_shape]` of what is held out, and what they are to be, both in float64."""
        held_out = self.held_out
        steps = max(self.leads) if self.is_split_in_time else held_out.length - 1
        starts: list[Start] = [start for start in held_out.starts(steps) if self.is_split_in_time or start[1] == 0]
        if not starts:
            raise ConfigurationError(f"{self._of('load_data')}: no state that is held out is complete at its start")
        size = self.config.training.batch_size
        parts = [
            model(windows(held_out, starts[first : first + size], steps, self.dtype)).detach().double()
            for first in range(0, len(starts), size)
        ]
        return torch.cat(parts, dim=1), windows(held_out, starts, steps, torch.float64)

    def baselines(self, batch: Windows) -> Mapping[str, torch.Tensor]:
        """Forecasts that the model is to beat, shaped like the targets of `batch`."""
        return {
            "persistence": batch.initial.expand_as(batch.targets),
            "training_mean": self.moments[0].expand_as(batch.targets),
        }

    @property
    def _error_scale(self) -> torch.Tensor:
        """In what errors are reported: in the data's units, or in standard deviations where those differ."""
        units = self.description.units
        different = not isinstance(units, str) and len(set(units)) > 1
        return self.moments[1] if different else torch.ones(())

    def mean_squares(self, forecast: torch.Tensor, batch: Windows) -> torch.Tensor:
        """The mean square error of each lead `[lead]`, in `units`. Collective on the state ranks."""
        error = ((forecast - batch.targets) / self._error_scale).flatten(1)
        if batch.weights is None:
            count = batch.targets.shape[1] * math.prod(batch.samples.partition.global_shape)
            total: torch.Tensor = self.mesh.sum(error.square().sum(dim=1), over="state")
            return total / count
        weights = batch.weights.flatten(1)
        sums = torch.stack([(error.square() * weights).sum(dim=1), weights.sum(dim=1)])
        squares, counts = self.mesh.sum(sums, over="state").unbind()
        return torch.as_tensor(squares / counts.clamp(min=1))

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Root mean square errors of forecasts of what is held out: over all leads, and at each evaluated lead."""
        forecast, batch = self.rollouts(model)
        squares = self.mean_squares(forecast, batch)
        return {
            "validation_rmse": math.sqrt(squares.mean().item()),
            **{f"lead_{lead}": math.sqrt(squares[lead - 1].item()) for lead in self.leads},
        }

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """The errors of the model and of the baselines at each lead; writes `forecast.h5` and `report.png`."""
        forecast, batch = self.rollouts(model)
        forecasts = {"model": forecast, **self.baselines(batch)}
        errors = {name: self.mean_squares(value, batch).sqrt() for name, value in forecasts.items()}
        rows = [
            {
                "lead": lead,
                "time": batch.times[0][lead] - batch.times[0][0],
                **{name: error[lead - 1].item() for name, error in errors.items()},
            }
            for lead in self.leads
        ]
        result = {
            "problem": self.name,
            "units": self.units,
            **self.figures(forecast, batch),
            "training": _described(self.samples),
            "validation": f"{len(batch.starts)} forecasts of {len(batch.targets)} samples",
            "rmse": rows,
        }
        write_forecast(run_directory / FORECAST, forecast, batch, self.description, self.units, self.mesh)
        result["forecast"] = str(run_directory / FORECAST)
        return {**result, "report": draw(run_directory / REPORT, lambda path: self.draw(path, result), self.mesh)}

    def figures(self, forecast: torch.Tensor, batch: Windows) -> dict[str, Any]:
        """Further figures of an evaluation, by name. Collective on the world."""
        return {}

    def draw(self, path: Path, result: Mapping[str, Any]) -> None:
        """Draw the picture of an evaluation, from `forecast.h5` and `metrics.jsonl` beside it. Rank 0 alone."""
        from pnode_dist.problems.common.forecast_plot import draw_report

        draw_report(path, path.with_name(FORECAST), path.with_name("metrics.jsonl"), result)

    # Cases

    def solve_case(self) -> SolveCase:
        """The first solve of the first training batch."""
        batch = next(self.batches(1))
        model = self.model
        assert isinstance(model, ForecastModel)
        group = next(model.groups(batch))
        return SolveCase(model.solve, model.encoded(batch.initial[list(group.windows)]), group.times)

    def gradcheck_case(self) -> GradcheckCase:
        """The training loss of the first window, as a function of its initial state."""
        window: int = self.settings.window
        batch = windows(self.samples, self.samples.starts(window)[:1], window, self.dtype)

        def loss(state: torch.Tensor) -> torch.Tensor:
            return self.loss(self.model, dataclasses.replace(batch, initial=state))

        return GradcheckCase(
            batch.initial.clone().requires_grad_(), loss, tuple(self.model.parameters()), self.partition
        )

    def _of(self, method: str) -> str:
        return f"{type(self).__name__}.{method}"


def _first(present: torch.Tensor | None, count: int) -> torch.Tensor | None:
    return None if present is None else present[:count]


def _rest(present: torch.Tensor | None, count: int) -> torch.Tensor | None:
    return None if present is None else present[count:]


def _described(samples: Samples) -> str:
    several = f"{samples.count} trajectories of " if samples.count > 1 else ""
    first, last = samples.times[0].item(), samples.times[-1].item()
    return f"{several}{samples.length} samples, times {first:g} to {last:g}"
