"""The training loop: an optimiser on gradients that are summed over the mesh."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.mesh import Mesh
from pnode_dist.problems.protocol import Batch, Problem
from pnode_dist.sync import clip_gradient_norm, parallel
from pnode_dist.train import run_directory
from pnode_dist.train.config import TrainingConfig
from pnode_dist.train.divergence import DivergenceError
from pnode_dist.train.metrics import MetricsFile, StepRecord, ValidationRecord, peak_memory
from pnode_dist.train.optimiser import optimiser_of
from pnode_dist.train.progress import EpochSummary, reporter


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the last epoch's mean loss, the figures of the parameters that were kept and their epoch."""

    steps: int
    seconds: float
    loss: float
    kept_epoch: int
    figures: dict[str, float]


@dataclass
class _Best:
    """The parameters with the least headline figure so far."""

    epoch: int
    figures: dict[str, float]
    parameters: list[torch.Tensor]


class _Optimiser:
    """One optimiser step at a time, counted and measured."""

    def __init__(self, problem: Problem, training: TrainingConfig, mesh: Mesh) -> None:
        self._problem, self._training, self._mesh = problem, training, mesh
        self._model = parallel(problem.model, mesh)
        self._optimiser = optimiser_of(training, self._model.parameters())
        self._schedule = None
        if training.schedule == "cosine":
            self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimiser, T_max=training.epochs)
        self._began = time.perf_counter()
        self.steps = 0

    @property
    def seconds(self) -> float:
        """Since training began."""
        return time.perf_counter() - self._began

    def step(self, batch: Batch, epoch: int) -> StepRecord:
        """One step; raises `DivergenceError` on all ranks before parameters are spoilt. Collective on the world."""
        self.steps += 1
        self._optimiser.zero_grad(set_to_none=True)
        share = self._problem.loss(self._model, batch)
        share.backward()  # type: ignore[no-untyped-call]
        solve = self._problem.solve_statistics()
        totals = self._mesh.sum(
            torch.tensor([share.item(), solve.bytes_written, solve.bytes_read], dtype=torch.float64)
        )
        loss = totals[0].item() / self._mesh.data_replicas
        # The gradient is already the sum over the ranks.
        limit = self._training.gradient_clip or math.inf
        norm = clip_gradient_norm(self._model, limit, self._mesh).item()
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                raise DivergenceError(
                    f"step {self.steps} (epoch {epoch}): the {name} is {value}: "
                    "try a smaller learning_rate, a gradient_clip or a smaller step_size"
                )
        learning_rate = self._optimiser.param_groups[0]["lr"]
        self._optimiser.step()
        memory = self._mesh.max(torch.tensor([peak_memory()], dtype=torch.int64))
        return StepRecord(
            step=self.steps,
            epoch=epoch,
            loss=loss,
            learning_rate=learning_rate,
            wall_time=self.seconds,
            gradient_norm=norm,
            forward_steps=solve.forward_steps,
            recomputed_steps=solve.recomputed_steps,
            adjoint_steps=solve.adjoint_steps,
            function_evaluations=solve.function_evaluations,
            vjps=solve.vjps,
            bytes_written=int(totals[1].item()),
            bytes_read=int(totals[2].item()),
            peak_memory=int(memory.item()),
            graph_steps=solve.graph_steps,
            seconds_waiting_for_disk=solve.seconds_waiting_for_disk,
            rejected_steps=solve.rejected_steps,
            largest_rounding=solve.largest_rounding,
        )

    def end_epoch(self) -> None:
        """Let the learning rate follow its schedule."""
        if self._schedule is not None:
            self._schedule.step()


def rehearse(problem: Problem) -> None:
    """Compute the loss of one batch, without its gradient and as in evaluation. Collective on the world.

    Done before a run writes or replaces anything, so that what only the solver can find wrong with a configuration
    is found here. Raises what the solver raises, and `ConfigurationError` when there is no training batch.
    """
    batch = next(problem.batches(1), None)
    if batch is None:
        raise ConfigurationError("there is no training batch: make batch_size smaller or the training part longer")
    with torch.no_grad(), _evaluating(problem.model):
        problem.loss(problem.model, batch)


def train(problem: Problem, training: TrainingConfig, mesh: Mesh, directory: Path) -> Outcome:
    """Train `problem.model` and leave metrics and parameters in `directory`. Collective on the world.

    Every rank differentiates its share of the loss; the gradients are summed over state ranks and averaged over data
    replicas, so parameters stay bit for bit the same on all ranks. The parameters are saved after each validation
    and at the end. Validation data choose parameters only with `keep = "best"`.
    Raises `DivergenceError` on all ranks when the loss or its gradient is not finite.
    """
    optimiser = _Optimiser(problem, training, mesh)
    metrics_path = directory / run_directory.METRICS if mesh.is_root else None
    best: _Best | None = None
    figures: dict[str, float] = {}
    loss = math.nan
    with (
        MetricsFile(metrics_path) as metrics,
        reporter(mesh.is_root, training.epochs, training.log_every) as report,
    ):
        for epoch in range(1, training.epochs + 1):
            began = time.perf_counter()
            losses = []
            for batch in problem.batches(epoch):
                record = optimiser.step(batch, epoch)
                metrics.write(record)
                losses.append(record.loss)
            optimiser.end_epoch()
            seconds = time.perf_counter() - began
            loss = math.fsum(losses) / len(losses)
            validates = epoch == training.epochs or (training.validate_every and epoch % training.validate_every == 0)
            headline = None
            if validates:
                figures = _validate(problem)
                metrics.write(ValidationRecord(optimiser.steps, epoch, optimiser.seconds, problem.units, figures))
                headline = next(iter(figures.items()), None)
                if training.keep == "best" and headline is not None and _improves(headline[1], best):
                    best = _Best(epoch, figures, [value.detach().clone() for value in problem.model.parameters()])
                if best is None or best.epoch == epoch:
                    run_directory.save_parameters(problem.model, directory / run_directory.MODEL, mesh)
            summary = EpochSummary(
                epoch, training.epochs, loss, seconds, len(losses) / seconds, headline, problem.units
            )
            report.epoch(summary)
    kept_epoch = training.epochs
    if best is not None:
        kept_epoch, figures = best.epoch, best.figures
        with torch.no_grad():
            for value, kept in zip(problem.model.parameters(), best.parameters, strict=True):
                value.copy_(kept)
    run_directory.save_parameters(problem.model, directory / run_directory.MODEL, mesh)
    mesh.barrier()
    return Outcome(optimiser.steps, optimiser.seconds, loss, kept_epoch, figures)


def _validate(problem: Problem) -> dict[str, float]:
    with torch.no_grad(), _evaluating(problem.model):
        return problem.validation(problem.model)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model as it is evaluated: a batch norm does not follow what it is given then."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _improves(figure: float, best: _Best | None) -> bool:
    return math.isfinite(figure) and (best is None or figure < next(iter(best.figures.values())))
