"""Field problem: learn the tendency of a gridded field from its past, forecast its last part, and compare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.gradients import share_of_mean
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse import Inverse, NegativeLogPosterior
from pnode_dist.ode.methods import gradient_refusal, resolve
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.batches import check_replicas, shared
from pnode_dist.problems.common.forecast_file import TRUTH
from pnode_dist.problems.common.forecast_stream import Forecast, Row, each_lead
from pnode_dist.problems.common.served_forecast import ForecastSource, served_forecasts, some
from pnode_dist.problems.common.solver import check_budget, neural_ode
from pnode_dist.problems.field.assimilation import Known, evaluated, inverse_of, known_window
from pnode_dist.problems.field.data import Field, Source, open_source, read_field
from pnode_dist.problems.field.forecast_file import ForecastFile
from pnode_dist.problems.field.model import FieldModel, Tendency, Windows, number_of_harmonics, windows
from pnode_dist.report.picture import draw
from pnode_dist.runs.directory import ANALYSIS, METRICS, take_trained
from pnode_dist.train.problem import Inversion
from pnode_dist.train.served_model import ServedModel
from pnode_dist.verify.gradcheck import GradcheckCase

if TYPE_CHECKING:
    from pnode_dist.problems.field.config import FieldRun

FORECAST, REPORT = "forecast.h5", "report.png"


def build_field(config: FieldRun, mesh: Mesh, dtype: torch.dtype) -> FieldProblem:
    """Build the configured field problem with a model that computes in `dtype`. Collective on the world.

    Raises `ConfigurationError` on all ranks if the data or the number of ranks do not allow the configuration.
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
    number_of_harmonics(model, source.time, np.flatnonzero(source.time.positions[:training] >= 0).tolist())
    partition = _partition(config, source, mesh)
    field = read_field(problem, source, partition, mesh)
    known = torch.nonzero(field.counts[:training].sum(dim=-1) > 0).flatten().tolist()
    harmonics = number_of_harmonics(model, source.time, known)
    check_replicas(config, mesh, len(field.starts(range(training - problem.window), problem.window)))
    _check_leads(config, field)
    # Draw from the seed alone and in float64, so that every rank and every dtype starts from the same parameters.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        tendency = Tendency(model, field, partition, mesh, harmonics)
    check_budget(config, partition, dtype, field.time.interval, problem.window)
    solve = neural_ode(config, tendency.to(dtype), partition)
    return FieldProblem(config, mesh, partition, field, FieldModel(solve, field.time.interval), dtype)


def _check_leads(config: FieldRun, field: Field) -> None:
    """Raise `ConfigurationError` if missing times leave no forecast start, or no truth at some lead."""
    starts = list(forecast_starts(config, field))
    if not starts:
        raise ConfigurationError(
            f"[problem] validation = {config.problem.validation}: no forecast can start, as values are missing at "
            "every time from which one would"
        )
    known = field.counts.sum(dim=-1) > 0
    for lead in config.evaluation.leads:
        if not known[torch.tensor(starts) + lead].any():
            raise ConfigurationError(
                f"[evaluation] leads: there is no value to judge a forecast by at lead {lead}: leave it out"
            )


def forecast_starts(config: FieldRun, field: Field) -> Sequence[int]:
    """Return the time indices at which forecasts of the validation part start. No value is missing there."""
    longest = max(config.evaluation.leads)
    return field.starts(range(field.training - 1, len(field.time) - longest), longest)


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
    """A field and its model, with training and evaluation. See `pnode_dist.train.problem.Problem`."""

    config: FieldRun
    mesh: Mesh
    partition: GridPartition
    field: Field
    model: FieldModel
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Names of the variables."""
        return self.field.name

    @property
    def units(self) -> str:
        """Units of errors over all channels."""
        return self.field.units

    def batches(self, epoch: int, done: int = 0) -> Iterator[Windows]:
        """Return this replica's training windows of an epoch, shuffled.

        No window touches the validation part or starts where values are missing.
        """
        window = self.config.problem.window
        candidates = self.field.starts(range(self.field.training - window), window)
        for starts in shared(candidates, self.config, self.mesh, epoch, done):
            yield windows(self.field, starts, window, self.dtype)

    def loss(self, model: nn.Module, batch: Windows) -> torch.Tensor:
        """Return this rank's share of the mean square error over the values inside.

        Errors are normalised. The mean is over all windows, leads and channels.
        """
        error: torch.Tensor = model(batch) - batch.targets
        if batch.present is not None:
            error = error * batch.present
        return share_of_mean(error.square().sum(), int(self._terms(batch).sum()), self.mesh)

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Return root mean square errors of forecasts of the validation part, over all leads and by evaluated lead.

        With several variables, also returns the error of each over all leads.
        """
        batch = self._held_out()
        squares, terms = self._squares(model, batch), self._terms(batch)
        figures = {"validation_rmse": _root(squares, terms)}
        for lead in self.config.evaluation.leads:
            figures[f"lead_{lead}"] = _root(squares[lead - 1], terms[lead - 1])
        variables = self.field.data.variables
        if len(variables) > 1:
            for variable in variables:
                part = variable.channels
                figures[f"{variable.name}_rmse"] = _root(squares[:, part], terms[:, part])
        return figures

    def solve_statistics(self) -> SolveStatistics:
        """Return the counts of the model's last call."""
        return self.model.solve.last_solve

    def solve_case(self) -> SolveCase:
        """Return the solve of the first training batch."""
        batch = next(self.batches(1))
        return SolveCase(self.model.solve, batch.initial, self.model.times(batch), self.model.arguments(batch))

    def gradcheck_case(self) -> GradcheckCase:
        """Return the training loss of the first window as a function of its initial state."""
        window = self.config.problem.window
        first = self.field.starts(range(self.field.training - window), window)[0]
        batch = windows(self.field, [first], window, self.dtype)

        def loss(state: torch.Tensor) -> torch.Tensor:
            return self.loss(self.model, dataclasses.replace(batch, initial=state))

        return GradcheckCase(
            batch.initial.clone().requires_grad_(), loss, tuple(self.model.parameters()), self.partition
        )

    def served(self) -> Sequence[ServedModel]:
        """Return the forecast of the validation part, and the posterior of `inverse` with a table `[inverse]`."""
        field, starts = self.field, forecast_starts(self.config, self.field)
        leads = self.config.evaluation.leads
        complete = torch.nonzero(field.complete[: field.training]).flatten()
        inside = field.inside.expand(self.partition.local_shape)
        source = ForecastSource(
            lambda start, steps: windows(field, [starts[start]], steps, self.dtype),
            len(starts),
            leads,
            max(leads),
            self.partition,
            inside if field.present is None else field.present.amax(dim=0),
            lambda: field.values[complete[list(some(len(complete)))]],
        )
        refusal = gradient_refusal(resolve(self.config.solver.method))
        posterior = () if self.config.inverse is None else (NegativeLogPosterior(self.inverse()),)
        return *served_forecasts(self.model, source, field.physical, refusal), *posterior

    @cached_property
    def known(self) -> Known:
        """The window of the validation part that `invert` observes."""
        return known_window(self.config, self.field, self.model, self.partition, self.mesh)

    def inverse(self) -> Inverse:
        """Return the inverse problem of the initial state of a window, in float64. Collective on the world."""
        known = self.known
        take_trained("[inverse] trained", self.config.inverse.trained, self.model, self.mesh)
        return inverse_of(self.config, self.field, self.model, known)

    def evaluate_inverse(self, found: Inversion, run_directory: Path) -> dict[str, Any]:
        """Return the errors of first guess, analysis and persistence; write `analysis.h5` and `report.png`."""
        file = run_directory / ANALYSIS
        figures = evaluated(self.config, self.field, self.mesh, self.known, found, file)

        def picture(path: Path) -> None:
            # Needs matplotlib, which may be missing.
            from pnode_dist.problems.field.assimilation_plots import draw_analysis

            draw_analysis(path, file, path.with_name(METRICS), figures)

        drawn = draw(run_directory / REPORT, picture, self.mesh)
        return {"problem": self.config.kind, **figures, "analysis": str(file), "report": drawn}

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """Return the errors of the model and of four simple forecasts by lead. Writes `forecast.h5` and `report.png`.

        All leads of a forecast lie in the validation part; the first forecast starts from the last training time.
        Errors are root mean squares over all starts and all values inside the mask, without area weights. Errors of one
        channel are in its own units. Errors over all channels are in their common units, or else in standard deviations
        of normalised values. Persistence repeats the field of the start. Climatology is the mean of the same season in
        the training part. Anomaly persistence adds the start's departure from climatology. Damped persistence scales
        this departure by its lag-one correlation in the training part, to the power of the lead.
        """
        batch = self._held_out()
        with ForecastFile(run_directory / FORECAST, batch, self.partition, self.mesh) as file:
            squares = {"model": self._squares(model, batch, partial(file.write, "forecast"))}
            for name, forecast in baselines(self.field, batch, self.mesh).items():
                squares[name] = self._squares(forecast, batch)
            each_lead(batch.target, batch, len(batch.starts), self.dtype, partial(file.write, TRUTH))
        terms, leads = self._terms(batch), self.config.evaluation.leads
        rows = [
            {"lead": lead, **{name: _root(value[lead - 1], terms[lead - 1]) for name, value in squares.items()}}
            for lead in leads
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
        if self.field.present is not None:
            result["missing"] = self.field.missing()
        if self.field.channels > 1:
            result["channels"] = self._by_channel(squares, terms)
        result["forecast"] = str(run_directory / FORECAST)
        return {**result, "report": draw(run_directory / REPORT, lambda path: self._draw(path, result), self.mesh)}

    def _draw(self, path: Path, result: dict[str, Any]) -> None:
        from pnode_dist.problems.field.plots import draw_report

        draw_report(path, path.with_name(FORECAST), path.with_name("metrics.jsonl"), result)

    def _held_out(self) -> Windows:
        """Return the windows of all forecasts of the validation part, in float64."""
        longest = max(self.config.evaluation.leads)
        return windows(self.field, forecast_starts(self.config, self.field), longest, torch.float64)

    def _squares(self, forecast: Forecast, batch: Windows, take: Callable[[Row], None] | None = None) -> torch.Tensor:
        """Return sums of square errors `[lead, channel]` of a forecast in the units of the errors.

        The forecast is computed lead by lead, and given to `take`. Collective on the state ranks.
        """
        squares = torch.zeros(batch.steps, self.field.channels, dtype=torch.float64)

        def add(row: Row) -> None:
            starts, mask = list(row.starts), batch.mask(row.lead)
            weights = self.field.inside if mask is None else mask[starts]
            error = (row.states - batch.target(row.lead)[starts]) * self.field.figure_scale * weights
            squares[row.lead - 1] += error.square().sum(dim=(0, 1, 2))
            if take is not None:
                take(row)

        each_lead(forecast, batch, self.config.training.batch_size, self.dtype, add)
        return self.mesh.sum(squares, over="state")

    def _terms(self, batch: Windows) -> torch.Tensor:
        """Return the numbers of values `[lead, channel]` in these sums, over all state ranks."""
        starts = torch.tensor(batch.starts, dtype=torch.int64)
        return torch.stack([self.field.counts[starts + lead].sum(dim=0) for lead in batch.leads])

    def _by_channel(self, squares: dict[str, torch.Tensor], terms: torch.Tensor) -> list[dict[str, Any]]:
        """Return the errors of each channel at each lead, in its own units."""
        data, field = self.field.data, self.field
        own = field.deviation / field.figure_scale
        return [
            {
                "channel": label,
                "units": data.units[number],
                "lead": lead,
                **{
                    name: own[number].item() * _root(value[lead - 1, number], terms[lead - 1, number])
                    for name, value in squares.items()
                },
            }
            for number, label in enumerate(data.labels)
            for lead in self.config.evaluation.leads
        ]


def _root(squares: torch.Tensor, terms: torch.Tensor) -> float:
    """Return the root mean square over all entries, or NaN without entries."""
    total = int(terms.sum())
    return math.sqrt(squares.sum().item() / total) if total else math.nan


def baselines(field: Field, batch: Windows, mesh: Mesh) -> dict[str, Callable[[int], torch.Tensor]]:
    """Return the simple forecasts of the windows as functions of the lead, normalised.

    Damping uses each channel's lag-one correlation of the training part's departures from climatology, to the power of
    the lead. Collective on the state ranks.
    """
    climatology = field.climatology()
    correlation = _lag_one_correlation(field, climatology, mesh)
    starts = torch.tensor(batch.starts)
    start = field.values[starts]
    departure = start - climatology[starts]
    return {
        "persistence": lambda lead: start,
        "climatology": lambda lead: climatology[starts + lead],
        "anomaly_persistence": lambda lead: climatology[starts + lead] + departure,
        "damped_persistence": lambda lead: climatology[starts + lead] + departure * correlation**lead,
    }


def _lag_one_correlation(field: Field, climatology: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return the correlation `[channel]` of successive departures from climatology in the training part.

    Collective on the state ranks.
    """
    weights = field.inside if field.present is None else field.present[: field.training]
    departures = (field.values - climatology)[: field.training] * weights
    products, squares = departures[:-1] * departures[1:], departures[:-1].square()
    if field.present is not None:
        # Exclude the square of a pair with a missing value, as its product is excluded.
        squares = squares * field.present[1 : field.training]
    moments = torch.stack([products.sum(dim=(0, 1, 2)), squares.sum(dim=(0, 1, 2))])
    covariance, variance = mesh.sum(moments, over="state")
    return torch.where(variance > 0, covariance / variance, torch.zeros_like(variance))
