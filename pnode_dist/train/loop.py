"""Training loop: optimiser steps on gradients summed over the mesh."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from pnode_dist.config.tables import SnapshotConfig, TrainingConfig
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import safe_points
from pnode_dist.runs import directory as run_directory
from pnode_dist.runs.capture import capture
from pnode_dist.runs.endings import DivergenceError, Preempted, RunDirectoryError
from pnode_dist.runs.heartbeat import Heartbeat
from pnode_dist.runs.metrics import ValidationRecord
from pnode_dist.runs.snapshot import Best, Position, Snapshot
from pnode_dist.train import optimiser
from pnode_dist.train.callbacks import Callbacks
from pnode_dist.train.journal import Journal, StepRequests
from pnode_dist.train.optimisation import ERRORS_OF_SOLVES, Optimisation, on_all_ranks
from pnode_dist.train.outcome import Outcome
from pnode_dist.train.preemption import Preemption, SolveAbandoned
from pnode_dist.train.problem import Problem
from pnode_dist.train.progress import EpochSummary, reporter


def check_first_batch(problem: Problem, training: TrainingConfig | None = None) -> None:
    """Compute the loss of one batch in evaluation mode, without its gradient. Collective on the world.

    Called before a run writes or replaces any file, to detect configuration errors that only the solver can detect.
    With `training`, the optimiser and its schedule are checked too. Raises the errors of the solver, and
    `ConfigurationError` if there is no training batch.
    """
    if training is not None:
        optimiser.check(training, problem.model)
    batch = next(problem.batches(1), None)
    if batch is None:
        raise ConfigurationError("there is no training batch: make batch_size smaller or the training part longer")
    with torch.no_grad(), _evaluating(problem.model):
        problem.loss(problem.model, batch)


def train(
    problem: Problem,
    training: TrainingConfig,
    mesh: Mesh,
    directory: Path,
    snapshots: SnapshotConfig | None = None,
    start: Snapshot | None = None,
    config: str = "",
    preemption: Preemption | None = None,
    heartbeat: Heartbeat | None = None,
    callbacks: Callbacks | None = None,
    source: str | None = None,
) -> Outcome:
    """Train `problem.model` and write metrics, parameters and snapshots to `directory`. Collective on the world.

    Every rank differentiates its share of the loss. The gradients are summed over state ranks and averaged over data
    replicas, so parameters stay bitwise identical on all ranks. The parameters are saved after each validation and at
    the end. Validation data select parameters only with `keep = "best"`. Training resumes from the snapshot `start`.
    `config` is the text of the configuration and `source` the hash of the problem's source; both are stored with
    snapshots. On a request by `preemption`, training stops between two steps, or abandons the current step.
    Raises, on all ranks, `DivergenceError` if the loss, its gradient or a parameter is not finite, `RunDirectoryError`
    if a file cannot be written to the directory, and `Preempted` if training was stopped after writing a snapshot.
    """
    journal = Journal(directory if mesh.is_root else None, snapshots or SnapshotConfig(), config, heartbeat, source)
    called = callbacks or Callbacks()
    watching = nullcontext() if preemption is None else safe_points.watched(preemption)
    with journal, reporter(mesh.is_root, training.epochs, training.log_every) as report:
        run = _Run(problem, training, mesh, directory, journal, start, preemption, called)
        with watching:
            while run.epoch <= training.epochs:
                summary = run.train_epoch()
                report.epoch(summary)
                called.epoch(summary)
        return run.finish()


class _Run:
    """State of the current run: its position and the best parameters so far."""

    def __init__(
        self,
        problem: Problem,
        training: TrainingConfig,
        mesh: Mesh,
        directory: Path,
        journal: Journal,
        start: Snapshot | None,
        preemption: Preemption | None,
        callbacks: Callbacks,
    ) -> None:
        self._problem, self._training, self._mesh, self._callbacks = problem, training, mesh, callbacks
        self._directory, self._journal, self._preemption = directory, journal, preemption
        self._optimiser = Optimisation(problem, training, mesh)
        self._best = None if start is None else self._optimiser.resume(start)
        position = Position() if start is None else start.position
        self.epoch = position.epoch
        journal.begin(position)
        self._losses, self._loss, self._figures = list(position.losses), position.loss, dict(position.figures)

    def train_epoch(self) -> EpochSummary:
        """Train the rest of an epoch and validate. Collective on the world."""
        try:
            return self._train_epoch()
        except SolveAbandoned:
            # The abandoned step or validation is not counted, and the parameters are those before it.
            self._stop()

    def _train_epoch(self) -> EpochSummary:
        training, began, done = self._training, time.perf_counter(), len(self._losses)
        for batch in self._problem.batches(self.epoch, done):
            self._journal.check()
            due = self._journal.due(self._optimiser.steps + 1)
            requests = StepRequests(
                stop=self._preemption is not None and self._preemption.wanted,
                snapshot=due,
                failed=self._journal.failure is not None,
            )
            try:
                record, agreed = self._optimiser.step(batch, self.epoch, requests)
            except (DivergenceError, *ERRORS_OF_SOLVES) as error:
                if not on_all_ranks(error, self._mesh):
                    raise
                raise type(error)(f"{error}; {self._last_snapshot()}") from None
            self._losses.append(record.loss)
            self._journal.write(record)
            self._callbacks.step(record)
            if agreed.failed:
                self._give_up()
            if agreed.stop:
                self._stop()
            if agreed.snapshot:
                self._keep_snapshot()
        seconds, steps = time.perf_counter() - began, len(self._losses) - done
        headline = self._validate() if self._is_validated() else None
        self._optimiser.end_epoch(None if headline is None else headline[1])
        self._loss = math.fsum(self._losses) / len(self._losses)
        summary = EpochSummary(
            self.epoch, training.epochs, self._loss, seconds, steps / seconds, headline, self._problem.units
        )
        self._journal.end_epoch(self.epoch, len(self._losses))
        self.epoch, self._losses = self.epoch + 1, []
        return summary

    def finish(self) -> Outcome:
        """Save the selected parameters and return the outcome. Collective on the world."""
        self._keep_snapshot(wait=True)
        kept_epoch, figures = self._training.epochs, self._figures
        if self._best is not None:
            kept_epoch, figures = self._best.epoch, self._best.figures
            with torch.no_grad():
                for name, value in self._problem.model.state_dict().items():
                    value.copy_(self._best.state[name])
        self._save_parameters()
        self._mesh.barrier()
        self._check_written()
        return Outcome(self._optimiser.steps, self._optimiser.seconds, self._loss, kept_epoch, figures)

    def _is_validated(self) -> bool:
        training = self._training
        return self.epoch == training.epochs or bool(
            training.validate_every and self.epoch % training.validate_every == 0
        )

    def _validate(self) -> tuple[str, float] | None:
        """Validate, select and save parameters, and return the headline figure. Collective on the world."""
        problem, best = self._problem, self._best
        self._figures = figures = _validate(problem)
        record = ValidationRecord(self._optimiser.steps, self.epoch, self._optimiser.seconds, problem.units, figures)
        self._journal.write(record)
        self._callbacks.validation(record)
        headline = next(iter(figures.items()), None)
        if self._training.keep == "best" and headline is not None and _improves(headline[1], best):
            state = {name: value.detach().clone() for name, value in problem.model.state_dict().items()}
            self._best = best = Best(self.epoch, figures, state)
        if best is None or best.epoch == self.epoch:
            self._save_parameters()
        return headline

    def _keep_snapshot(self, wait: bool = False) -> None:
        """Take a snapshot and pass it to the journal. Collective on the world."""
        self._journal.keep(self._snapshot(), wait=wait)
        self._callbacks.snapshot(self._optimiser.steps)

    def _save_parameters(self) -> None:
        try:
            run_directory.save_parameters(self._problem.model, self._directory / run_directory.MODEL, self._mesh)
        except OSError as error:
            self._journal.fail("model", error)

    def _snapshot(self) -> Snapshot | None:
        """Take a snapshot of the run after its last step, returned on rank 0. Collective on the world.

        Raises `DivergenceError` on all ranks if a parameter is not finite.
        """
        self._check_finite()
        position = Position(
            self._optimiser.steps,
            self.epoch,
            tuple(self._losses),
            self._optimiser.seconds,
            self._loss,
            self._figures,
            self._journal.metrics_size,
        )
        return capture(self._optimiser.trained, position, self._best, self._optimiser.before, self._mesh)

    def _check_finite(self) -> None:
        parameters = self._problem.model.named_parameters()
        spoilt = next((name for name, value in parameters if not value.detach().isfinite().all()), None)
        names = self._mesh.gather_object(spoilt) or ()
        spoilt = self._mesh.broadcast_object(next((name for name in names if name is not None), None))
        if spoilt is not None:
            raise DivergenceError(
                f"step {self._optimiser.steps}: the parameter {spoilt} is not finite after it: "
                f"try a smaller learning_rate or a gradient_clip; {self._last_snapshot()}"
            )

    def _last_snapshot(self) -> str:
        """Describe the last snapshot in words. Collective on the world."""
        return str(self._mesh.broadcast_object(self._journal.last_snapshot()))

    def _stop(self) -> NoReturn:
        """Write a snapshot and raise `Preempted` on all ranks. Collective on the world."""
        assert self._preemption is not None
        reason = self._preemption.reason()
        self._keep_snapshot(wait=True)
        self._check_written()
        raise Preempted(
            f"stopped after step {self._optimiser.steps}, in epoch {self.epoch} of {self._training.epochs}: {reason}; "
            "--resume auto goes on"
        )

    def _check_written(self) -> None:
        """Raise `RunDirectoryError` on all ranks if a file could not be written. Collective on the world."""
        if self._mesh.max(torch.tensor([int(self._journal.failure is not None)])).item():
            self._give_up()

    def _give_up(self) -> NoReturn:
        """Raise `RunDirectoryError` on all ranks with the failure of rank 0. Collective on the world."""
        raise RunDirectoryError(self._mesh.broadcast_object(self._journal.failure))


def _validate(problem: Problem) -> dict[str, float]:
    with torch.no_grad(), _evaluating(problem.model):
        return problem.validation(problem.model)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation mode, in which batch norms do not update their running statistics."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _improves(figure: float, best: Best | None) -> bool:
    return math.isfinite(figure) and (best is None or figure < next(iter(best.figures.values())))
