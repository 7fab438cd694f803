"""The training loop: an optimiser on gradients that are summed over the mesh."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pnode_dist.checkpointing.store import PrecisionError, SpillError
from pnode_dist.config.tables import SnapshotConfig, TrainingConfig
from pnode_dist.distributed.gradients import clip_gradient_norm, parallel
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError, ConvergenceError, StepSizeError
from pnode_dist.ode import safe_points
from pnode_dist.runs import directory as run_directory
from pnode_dist.runs.capture import Trained, capture, restore
from pnode_dist.runs.endings import DivergenceError, Preempted, RunDirectoryError
from pnode_dist.runs.heartbeat import Heartbeat
from pnode_dist.runs.metrics import StepRecord, ValidationRecord, peak_memory
from pnode_dist.runs.rank_state import put_back, rank_state, versions_of_buffers
from pnode_dist.runs.snapshot import Best, Position, Snapshot
from pnode_dist.runs.tensorboard import EventFile
from pnode_dist.train import not_finite
from pnode_dist.train.journal import Journal, Wishes, wishes_of
from pnode_dist.train.optimiser import optimiser_of
from pnode_dist.train.preemption import GivenUp, Preemption
from pnode_dist.train.problem import Batch, Problem
from pnode_dist.train.progress import EpochSummary, reporter

_ERRORS_OF_SOLVES = (ConvergenceError, PrecisionError, SpillError, StepSizeError)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the last epoch's mean loss, the figures of the parameters that were kept and their epoch."""

    steps: int
    seconds: float
    loss: float
    kept_epoch: int
    figures: dict[str, float]


class _Optimiser:
    """One optimiser step at a time, counted and measured."""

    def __init__(self, problem: Problem, training: TrainingConfig, mesh: Mesh) -> None:
        self._problem, self._training, self._mesh = problem, training, mesh
        self._model = parallel(problem.model, mesh)
        self._optimiser = optimiser_of(training, self._model.parameters())
        self._schedule = None
        if training.schedule == "cosine":
            self._schedule = CosineAnnealingLR(self._optimiser, T_max=training.epochs)
        self._built = versions_of_buffers(problem.model)
        self._began = time.perf_counter()
        self.steps = 0
        self.before = rank_state(problem.model, self._built)
        """This rank's state before what is being done now."""

    @property
    def trained(self) -> Trained:
        """What a snapshot is taken of."""
        return Trained(self._problem.model, self._optimiser, self._schedule)

    def resume(self, snapshot: Snapshot) -> Best | None:
        """Go on from a snapshot; the best parameters until then. Collective on the world."""
        if self._mesh.size > 1 and snapshot.position.step > 0:
            # DistributedDataParallel orders its buckets by the first backward pass, and they decide how it rounds sums.
            self._problem.loss(self._model, next(self._problem.batches(1))).backward()  # type: ignore[no-untyped-call]
        best = restore(snapshot, self.trained, self._mesh)
        if self._schedule is not None and self._schedule.T_max != self._training.epochs:
            self._follow_longer_schedule(self._schedule)
        # Or the schedule would warn that there was no step before its own.
        self._optimiser._opt_called = snapshot.position.step > 0  # type: ignore[attr-defined]
        self.steps = snapshot.position.step
        self._began = time.perf_counter() - snapshot.position.seconds
        self.mark()
        return best

    def _follow_longer_schedule(self, schedule: CosineAnnealingLR) -> None:
        """The run is longer than it was to be: the learning rate is where it would be, had that been known."""
        schedule.T_max = self._training.epochs
        share = (1 + math.cos(math.pi * schedule.last_epoch / schedule.T_max)) / 2
        for group in self._optimiser.param_groups:
            group["lr"] = group["initial_lr"] * share

    def mark(self) -> None:
        """Remember this rank's state: what is done next may be given up."""
        self.before = rank_state(self._problem.model, self._built)

    @property
    def seconds(self) -> float:
        """Since training began."""
        return time.perf_counter() - self._began

    def step(self, batch: Batch, epoch: int, wishes: Wishes) -> tuple[StepRecord, Wishes]:
        """One step, and what some rank wishes for after it. Collective on the world.

        Raises `DivergenceError` on all ranks before parameters are spoilt, and what the solver raises on all ranks of
        its state, both with the number of the step.
        """
        self._optimiser.zero_grad(set_to_none=True)
        try:
            share = self._problem.loss(self._model, batch)
            share.backward()  # type: ignore[no-untyped-call]
        except _ERRORS_OF_SOLVES as error:
            origin = self._origin(batch, 0.0, backward=True) if _on_all_ranks(error, self._mesh) else ""
            raise type(error)(f"step {self.steps + 1} (epoch {epoch}): {error}{origin}") from None
        # From here on the step is not given up any more.
        self.steps += 1
        solve = self._problem.solve_statistics()
        totals = self._mesh.sum(
            torch.tensor(
                [share.item(), solve.bytes_written, solve.bytes_read, *wishes.as_numbers()], dtype=torch.float64
            )
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
                    f"{self._origin(batch, share.item(), backward=math.isfinite(loss))}"
                )
        learning_rate = self._optimiser.param_groups[0]["lr"]
        self._optimiser.step()
        memory = self._mesh.max(torch.tensor([peak_memory()], dtype=torch.int64))
        record = StepRecord(
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
        self.mark()
        return record, wishes_of(totals[3:].tolist())

    def _origin(self, batch: Batch, share: float, backward: bool) -> str:
        """See `not_finite.origin`. Collective on the world."""
        put_back(self.before, self._problem.model)
        return not_finite.origin(self._problem, batch, share, self._mesh, backward)

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
    events: EventFile | None = None,
) -> Outcome:
    """Train `problem.model` and leave metrics, parameters and snapshots in `directory`. Collective on the world.

    Every rank differentiates its share of the loss; the gradients are summed over state ranks and averaged over data
    replicas, so parameters stay bit for bit the same on all ranks. The parameters are saved after each validation
    and at the end. Validation data choose parameters only with `keep = "best"`. Training goes on from `start`; `config`
    is the text of the configuration, to be kept with snapshots. Asked by `preemption`, it stops between two steps, or
    within one that it gives up.
    Raises `DivergenceError` when the loss, its gradient or a parameter is not finite, `RunDirectoryError` when the
    directory takes no more, and `Preempted` when it was stopped and has left a snapshot, on all ranks.
    """
    journal = Journal(directory if mesh.is_root else None, snapshots or SnapshotConfig(), config, heartbeat, events)
    watching = nullcontext() if preemption is None else safe_points.watched(preemption)
    with journal, reporter(mesh.is_root, training.epochs, training.log_every) as report:
        run = _Run(problem, training, mesh, directory, journal, start, preemption)
        with watching:
            while run.epoch <= training.epochs:
                report.epoch(run.train_epoch())
        return run.finish()


class _Run:
    """A run under way: how far it has come, and the best parameters so far."""

    def __init__(
        self,
        problem: Problem,
        training: TrainingConfig,
        mesh: Mesh,
        directory: Path,
        journal: Journal,
        start: Snapshot | None,
        preemption: Preemption | None,
    ) -> None:
        self._problem, self._training, self._mesh = problem, training, mesh
        self._directory, self._journal, self._preemption = directory, journal, preemption
        self._optimiser = _Optimiser(problem, training, mesh)
        self._best = None if start is None else self._optimiser.resume(start)
        position = Position() if start is None else start.position
        self.epoch = position.epoch
        self._losses, self._loss, self._figures = list(position.losses), position.loss, dict(position.figures)

    def train_epoch(self) -> EpochSummary:
        """The rest of an epoch, and its validation. Collective on the world."""
        try:
            return self._train_epoch()
        except GivenUp:
            # Of what was under way nothing has been counted, and the parameters are those before it.
            self._stop()

    def _train_epoch(self) -> EpochSummary:
        training, began, done = self._training, time.perf_counter(), len(self._losses)
        for batch in self._problem.batches(self.epoch, done):
            self._journal.check()
            due = self._journal.due(self._optimiser.steps + 1)
            wishes = Wishes(
                stop=self._preemption is not None and self._preemption.wanted,
                snapshot=due,
                failed=self._journal.failure is not None,
            )
            try:
                record, agreed = self._optimiser.step(batch, self.epoch, wishes)
            except (DivergenceError, *_ERRORS_OF_SOLVES) as error:
                if not _on_all_ranks(error, self._mesh):
                    raise
                raise type(error)(f"{error}; {self._last_snapshot()}") from None
            self._losses.append(record.loss)
            self._journal.write(record)
            if agreed.failed:
                self._give_up()
            if agreed.stop:
                self._stop()
            if agreed.snapshot:
                self._journal.keep(self._snapshot())
        seconds, steps = time.perf_counter() - began, len(self._losses) - done
        headline = self._validate() if self._is_validated() else None
        self._optimiser.end_epoch()
        self._loss = math.fsum(self._losses) / len(self._losses)
        summary = EpochSummary(
            self.epoch, training.epochs, self._loss, seconds, steps / seconds, headline, self._problem.units
        )
        self._journal.end_epoch(self.epoch, len(self._losses))
        self.epoch, self._losses = self.epoch + 1, []
        return summary

    def finish(self) -> Outcome:
        """Save what is kept of the trained parameters. Collective on the world."""
        self._journal.keep(self._snapshot(), wait=True)
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
        """Validate, and choose and save parameters; the headline. Collective on the world."""
        problem, best = self._problem, self._best
        self._figures = figures = _validate(problem)
        self._journal.write(
            ValidationRecord(self._optimiser.steps, self.epoch, self._optimiser.seconds, problem.units, figures)
        )
        headline = next(iter(figures.items()), None)
        if self._training.keep == "best" and headline is not None and _improves(headline[1], best):
            state = {name: value.detach().clone() for name, value in problem.model.state_dict().items()}
            self._best = best = Best(self.epoch, figures, state)
        if best is None or best.epoch == self.epoch:
            self._save_parameters()
        return headline

    def _save_parameters(self) -> None:
        try:
            run_directory.save_parameters(self._problem.model, self._directory / run_directory.MODEL, self._mesh)
        except OSError as error:
            self._journal.fail("model", error)

    def _snapshot(self) -> Snapshot | None:
        """The run after its last step, on rank 0. Collective on the world.

        Raises `DivergenceError` on all ranks instead of keeping parameters that are not finite.
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
        """What the run has left to go on from, in words. Collective on the world."""
        return str(self._mesh.broadcast_object(self._journal.last_snapshot()))

    def _stop(self) -> NoReturn:
        """Leave a snapshot, and end on all ranks. Collective on the world."""
        assert self._preemption is not None
        reason = self._preemption.reason()
        self._journal.keep(self._snapshot(), wait=True)
        self._check_written()
        raise Preempted(
            f"stopped after step {self._optimiser.steps}, in epoch {self.epoch} of {self._training.epochs}: {reason}; "
            "--resume auto goes on"
        )

    def _check_written(self) -> None:
        """End all ranks if some file could not be written. Collective on the world."""
        if self._mesh.max(torch.tensor([int(self._journal.failure is not None)])).item():
            self._give_up()

    def _give_up(self) -> NoReturn:
        """End all ranks because some file cannot be written. Collective on the world."""
        raise RunDirectoryError(self._mesh.broadcast_object(self._journal.failure))


def _on_all_ranks(error: Exception, mesh: Mesh) -> bool:
    """Whether all ranks raise `error` alike: solves raise theirs on all ranks of a state, or where one does not fit."""
    if isinstance(error, DivergenceError):
        return True
    return mesh.data_replicas == 1 and not isinstance(error, PrecisionError)


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


def _improves(figure: float, best: Best | None) -> bool:
    return math.isfinite(figure) and (best is None or figure < next(iter(best.figures.values())))
