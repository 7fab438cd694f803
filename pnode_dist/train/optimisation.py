"""Optimiser steps: loss, gradient, finiteness checks, and the record of the cost of each step."""

from __future__ import annotations

import math
import time

import torch

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.checkpointing.store import PrecisionError, SpillError
from pnode_dist.config.tables import TrainingConfig
from pnode_dist.distributed.gradients import clip_gradient_norm, parallel
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConvergenceError, StepSizeError
from pnode_dist.runs.capture import Trained, restore
from pnode_dist.runs.endings import DivergenceError
from pnode_dist.runs.metrics import StepRecord, peak_memory
from pnode_dist.runs.rank_state import rank_state, restore_rank_state, versions_of_buffers
from pnode_dist.runs.snapshot import Best, Snapshot
from pnode_dist.system.torch_internals import set_step_was_taken
from pnode_dist.train import not_finite
from pnode_dist.train.journal import StepRequests, requests_of
from pnode_dist.train.optimiser import (
    follow_longer_run,
    follows_validation,
    needs_closure,
    optimiser_of,
    schedule_of,
)
from pnode_dist.train.problem import Batch, Problem

ERRORS_OF_SOLVES = (ConvergenceError, PrecisionError, SpillError, StepSizeError)


class Optimisation:
    """Take optimiser steps one at a time; count and measure them."""

    def __init__(self, problem: Problem, training: TrainingConfig, mesh: Mesh) -> None:
        self._problem, self._training, self._mesh = problem, training, mesh
        self._model = parallel(problem.model, mesh)
        self._optimiser = optimiser_of(training, problem.model)
        self._schedule = schedule_of(training, self._optimiser)
        self._needs_closure = needs_closure(self._optimiser)
        self._built = versions_of_buffers(problem.model)
        self._began = time.perf_counter()
        self.steps = 0
        self.before = rank_state(problem.model, self._built)
        """This rank's state before the current step."""

    @property
    def trained(self) -> Trained:
        """Objects that a snapshot captures."""
        return Trained(self._problem.model, self._optimiser, self._schedule)

    def resume(self, snapshot: Snapshot) -> Best | None:
        """Restore a snapshot and return the best parameters so far. Collective on the world."""
        if self._mesh.size > 1 and snapshot.position.step > 0:
            # DistributedDataParallel orders its buckets by the first backward pass; their order affects how sums round.
            self._problem.loss(self._model, next(self._problem.batches(1))).backward()  # type: ignore[no-untyped-call]
        best = restore(snapshot, self.trained, self._mesh)
        follow_longer_run(self._schedule, self._optimiser, self._training.epochs)
        # Otherwise the schedule warns that it is stepped before the optimiser.
        set_step_was_taken(self._optimiser, snapshot.position.step > 0)
        self.steps = snapshot.position.step
        self._began = time.perf_counter() - snapshot.position.seconds
        self.mark()
        return best

    def mark(self) -> None:
        """Save this rank's state; a snapshot taken after an abandoned step stores this state."""
        self.before = rank_state(self._problem.model, self._built)

    @property
    def seconds(self) -> float:
        """Seconds since training began."""
        return time.perf_counter() - self._began

    def step(self, batch: Batch, epoch: int, requests: StepRequests) -> tuple[StepRecord, StepRequests]:
        """Take one step; return its record and the requests of all ranks after it. Collective on the world.

        Raises `DivergenceError` on all ranks before the parameters are changed, and the errors of the solver on all
        ranks of its state. Both messages name the step.
        """
        share, solve = self._share_and_gradient(batch, epoch)
        # Past this point the step is no longer abandoned.
        self.steps += 1
        totals = self._mesh.sum(
            torch.tensor([share, solve.bytes_written, solve.bytes_read, *requests.as_numbers()], dtype=torch.float64)
        )
        loss = totals[0].item() / self._mesh.data_replicas
        norm = self._clipped_norm()
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                raise DivergenceError(
                    f"step {self.steps} (epoch {epoch}): the {name} is {value}: "
                    "try a smaller learning_rate, a gradient_clip or a smaller step_size"
                    f"{self._origin(batch, share, backward=math.isfinite(loss))}"
                )
        learning_rate = self._optimiser.param_groups[0]["lr"]
        if self._needs_closure:
            solve = solve + self._step_with_closure(batch, epoch, loss)
        else:
            self._optimiser.step()
        if self._schedule is not None and self._training.schedule_every == "step":
            self._schedule.step()
        memory = self._mesh.max(torch.tensor([peak_memory()], dtype=torch.int64))
        record = StepRecord(
            step=self.steps,
            epoch=epoch,
            loss=loss,
            learning_rate=float(learning_rate),
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
        return record, requests_of(totals[3:].tolist())

    def _share_and_gradient(self, batch: Batch, epoch: int) -> tuple[float, SolveStatistics]:
        """Compute the gradient; return this rank's share of the loss and the solve costs. Collective on the world."""
        self._optimiser.zero_grad(set_to_none=True)
        try:
            share = self._problem.loss(self._model, batch)
            share.backward()  # type: ignore[no-untyped-call]
        except ERRORS_OF_SOLVES as error:
            origin = self._origin(batch, 0.0, backward=True) if on_all_ranks(error, self._mesh) else ""
            raise type(error)(f"step {self.steps + 1} (epoch {epoch}): {error}{origin}") from None
        return share.item(), self._problem.solve_statistics()

    def _clipped_norm(self) -> float:
        """Clip the gradient, already summed over the ranks, and return its norm before clipping."""
        limit = self._training.gradient_clip or math.inf
        return clip_gradient_norm(self._model, limit, self._mesh).item()

    def _step_with_closure(self, batch: Batch, epoch: int, loss: float) -> SolveStatistics:
        """Step an optimiser that evaluates the loss itself.

        Its first evaluation reuses `loss` and the current gradient. Returns the cost of its further evaluations.
        `loss` must be the same on every rank. Collective on the world.
        """
        known: float | None = loss
        spent = SolveStatistics()

        def closure() -> float:
            nonlocal known, spent
            if known is not None:
                value, known = known, None
                return value
            share, solve = self._share_and_gradient(batch, epoch)
            spent = spent + solve
            total = self._mesh.sum(torch.tensor([share], dtype=torch.float64)).item() / self._mesh.data_replicas
            if not math.isfinite(total):
                raise DivergenceError(
                    f"step {self.steps} (epoch {epoch}): the loss is {total} within a step of the optimiser: try a "
                    "smaller learning_rate or a line search"
                )
            self._clipped_norm()
            return float(total)

        self._optimiser.step(closure)
        return spent

    def _origin(self, batch: Batch, share: float, backward: bool) -> str:
        """Restore the state before the step and call `not_finite.origin`. Collective on the world."""
        restore_rank_state(self.before, self._problem.model)
        return not_finite.origin(self._problem, batch, share, self._mesh, backward)

    def end_epoch(self, figure: float | None) -> None:
        """Advance a schedule that is stepped per epoch; `figure` is the headline validation figure, if computed."""
        if self._schedule is None or self._training.schedule_every == "step":
            return
        if not follows_validation(self._schedule):
            self._schedule.step()
        elif figure is not None:
            self._schedule.step(figure)  # type: ignore[arg-type]


def on_all_ranks(error: Exception, mesh: Mesh) -> bool:
    """Return True if all ranks raise `error`.

    A solve raises on all ranks of its state, or, for `PrecisionError`, only on the ranks where a value does not fit.
    """
    if isinstance(error, DivergenceError):
        return True
    return mesh.data_replicas == 1 and not isinstance(error, PrecisionError)
