"""The field problem: learn the tendency of a field on a grid from its past, forecast its last part, and compare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.gradients import share_of_mean
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.batches import check_replicas, shared
from pnode_dist.problems.common.solver import check_budget, neural_ode
from pnode_dist.problems.field.data import Field, Source, open_source, read_field
from pnode_dist.problems.field.forecast_file import Forecast, write_forecast
from pnode_dist.problems.field.model import FieldModel, Tendency, Windows, number_of_harmonics, windows
from pnode_dist.report.picture import draw
from pnode_dist.verify.gradcheck import GradcheckCase

if TYPE_CHECKING:
    from pnode_dist.problems.field.config import FieldRun

FORECAST, REPORT = "forecast.h5", "report.png"


def build_field(config: FieldRun, mesh: Mesh, dtype: torch.dtype) -> FieldProblem:
    """The configured field problem, its model computing in `dtype`. Collective on the world.

    Raises `ConfigurationError` on all ranks for whatever the data or the number of ranks do not allow.
    """
    problem, model = config.problem, config.model
    source = agreed(mesh, lambda: open_source(problem))
    longest = max(config.evaluation.leads)
    if longest > problem.validation:
        raise ConfigurationError(
            f"[evaluation] leads = {list(config.evaluation.leads)}: must be at most [problem] validation = "
            f"{problem.validation}, so that a whole forecast lies in the validation part"
        )
    training = len(source.time) - problem.validation
    check_replicas(config, mesh, training - problem.window)
    harmonics = number_of_harmonics(model, source.time, training)
    partition = _partition(config, source, mesh)
    field = read_field(problem, source, partition, mesh)
    source.dataset.close()
    # From the seed alone, and in float64, so that every rank and every dtype starts from the same parameters.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        tendency = Tendency(model, field, partition, mesh, harmonics)
    check_budget(config, partition, field.time.step, problem.window)
    solve = neural_ode(config, tendency.to(dtype), partition)
    return FieldProblem(config, mesh, partition, field, FieldModel(solve, field.time.step), dtype)


def _partition(config: FieldRun, source: Source, mesh: Mesh) -> GridPartition:
    problem, model = config.problem, config.model
    halo = max(model.dilations) * (model.kernel_size - 1) // 2
    try:
        return GridPartition(mesh, source.shape, source.channels, problem.boundary, halo, problem.processes)
    except ConfigurationError as error:
        key = f"[mesh] state = {mesh.state_ranks}" if problem.processes is None else "[problem] processes"
        raise ConfigurationError(f"{key}: {error}; [model] dilations and kernel_size need a halo of {halo}") from None


@dataclass(frozen=True)
class FieldProblem:
    """A field, its model, and how one is learnt and judged by the other. See `pnode_dist.train.problem.Problem`."""

    config: FieldRun
    mesh: Mesh
    partition: GridPartition
    field: Field
    model: FieldModel
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The variable's name."""
        return self.field.name

    @property
    def units(self) -> str:
        """The variable's units."""
        return self.field.units

    def batches(self, epoch: int, done: int = 0) -> Iterator[Windows]:
        """This replica's training windows of an epoch, shuffled. No window touches the validation part."""
        window = self.config.problem.window
        for starts in shared(range(self.field.training - window), self.config, self.mesh, epoch, done):
            yield windows(self.field, starts, window, self.dtype)

    def loss(self, model: nn.Module, batch: Windows) -> torch.Tensor:
        """This rank's share of the mean square error, normalised, over cells inside, windows, leads and channels."""
        error: torch.Tensor = model(batch) - batch.targets
        leads, size = batch.targets.shape[:2]
        return share_of_mean(error.square().sum(), leads * size * self.field.cells * self.field.channels, self.mesh)

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Root mean square errors of forecasts of the validation part, over all leads and for each evaluated lead."""
        forecast, batch = self._forecast(model)
        squares = self._mean_squares(forecast, batch.targets)
        leads = self.config.evaluation.leads
        return {
            "validation_rmse": math.sqrt(squares.mean().item()),
            **{f"lead_{lead}": math.sqrt(squares[lead - 1].item()) for lead in leads},
        }

    def solve_statistics(self) -> SolveStatistics:
        """The counts of the model's last call."""
        return self.model.solve.last_solve

    def solve_case(self) -> SolveCase:
        """The solve of the first training batch."""
        batch = next(self.batches(1))
        times = [number * self.field.time.step for number in range(len(batch.targets) + 1)]
        return SolveCase(self.model.solve, batch.initial, times, (batch.phase,))

    def gradcheck_case(self) -> GradcheckCase:
        """The training loss of the first window, as a function of its initial state."""
        batch = windows(self.field, [0], self.config.problem.window, self.dtype)

        def loss(state: torch.Tensor) -> torch.Tensor:
            return self.loss(self.model, dataclasses.replace(batch, initial=state))

        return GradcheckCase(
            batch.initial.clone().requires_grad_(), loss, tuple(self.model.parameters()), self.partition
        )

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """The errors of the model and of four simple forecasts at each lead; writes `forecast.h5` and `report.png`.

        A forecast starts from a time such that all that it forecasts, up to the longest lead, lies in the validation
        part; the first starts from the last training time. Errors are root mean squares over all starts and all
        cells inside the mask, not weighted by area. Persistence keeps the start's field; climatology is the mean of
        the same season in the training part; anomaly persistence adds the start's departure from climatology to it,
        and damped persistence only as much of it as persists from one step to the next in the training part.
        """
        forecast, batch = self._forecast(model)
        forecasts = {"model": forecast, **baselines(self.field, batch, self.mesh)}
        errors = {name: self._mean_squares(value, batch.targets).sqrt() for name, value in forecasts.items()}
        rows = [
            {"lead": lead, **{name: error[lead - 1].item() for name, error in errors.items()}}
            for lead in self.config.evaluation.leads
        ]
        time, training = self.field.time, self.field.training
        result = {
            "variable": self.name,
            "units": self.units,
            "cells": self.field.cells,
            "lead_unit": time.step_name,
            "training": f"{time.label(0)} to {time.label(training - 1)}, {training} times",
            "validation": f"{time.label(training)} to {time.label(len(time) - 1)}, {len(time) - training} times",
            "forecasts": f"{len(batch.starts)} starts, {time.label(batch.starts[0])} to {time.label(batch.starts[-1])}",
            "rmse": rows,
        }
        self._write(forecast, batch, run_directory)
        result["forecast"] = str(run_directory / FORECAST)
        return {**result, "report": draw(run_directory / REPORT, lambda path: self._draw(path, result), self.mesh)}

    def _draw(self, path: Path, result: dict[str, Any]) -> None:
        from pnode_dist.problems.field.plots import draw_report

        draw_report(path, path.with_name(FORECAST), path.with_name("metrics.jsonl"), result)

    def _forecast(self, model: nn.Module) -> tuple[torch.Tensor, Windows]:
        """Forecasts `[lead, start, ny_local, nx_local, channel]` of the validation part, and what they are to be."""
        longest = max(self.config.evaluation.leads)
        starts = range(self.field.training - 1, len(self.field.time) - longest)
        size = self.config.training.batch_size
        parts = []
        for first in range(0, len(starts), size):
            parts.append(model(windows(self.field, list(starts[first : first + size]), longest, self.dtype)).detach())
        return torch.cat(parts, dim=1), windows(self.field, list(starts), longest, torch.float64)

    def _mean_squares(self, forecast: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """The mean square error of each lead `[lead]` in the field's units. Collective on the state ranks."""
        error = (forecast.double() - truth) * self.field.deviation * self.field.inside
        squares = self.mesh.sum(error.square().sum(dim=(1, 2, 3, 4)), over="state")
        return squares / (truth.shape[1] * self.field.cells * self.field.channels)

    def _write(self, forecast: torch.Tensor, batch: Windows, run_directory: Path) -> None:
        outside = self.field.inside == 0

        def stored(values: torch.Tensor) -> torch.Tensor:
            return self.field.physical(values).masked_fill(outside, math.nan).transpose(0, 1)

        contents = Forecast(self.field, batch.starts, stored(forecast), stored(batch.targets))
        write_forecast(run_directory / FORECAST, contents, self.partition, self.mesh)


def baselines(field: Field, batch: Windows, mesh: Mesh) -> dict[str, torch.Tensor]:
    """What a forecast is to beat, for each of the windows' leads, normalised and shaped like their targets.

    Damping is by the lag-one correlation of the training part's departures from climatology, to the power of the
    lead. Collective on the state ranks.
    """
    climatology = field.climatology()
    departures = ((field.values - climatology) * field.inside)[: field.training]
    moments = torch.stack([(departures[:-1] * departures[1:]).sum(), departures[:-1].square().sum()])
    covariance, variance = mesh.sum(moments, over="state")
    correlation = covariance / variance if variance > 0 else torch.zeros_like(variance)
    starts = torch.tensor(batch.starts)
    usual = torch.stack([climatology[starts + lead] for lead in range(1, len(batch.targets) + 1)])
    start = field.values[starts]
    damping = correlation ** torch.arange(1, len(usual) + 1).reshape(-1, 1, 1, 1, 1)
    return {
        "persistence": start.expand_as(usual),
        "climatology": usual,
        "anomaly_persistence": usual + (start - climatology[starts]),
        "damped_persistence": usual + (start - climatology[starts]) * damping,
    }
