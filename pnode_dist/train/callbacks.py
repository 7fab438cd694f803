"""Callbacks of a training run, and the functions that call them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pnode_dist.runs.metrics import StepRecord, ValidationRecord
from pnode_dist.train.outcome import Outcome
from pnode_dist.train.progress import EpochSummary


@dataclass(frozen=True)
class RunStart:
    """Start of a new or resumed run: its directory, its configuration as tables, and the last completed step."""

    directory: Path
    config: dict[str, Any]
    step: int = 0


class Callback:
    """Base class of callbacks; its methods do nothing.

    The methods are called on rank 0 only, or on every rank with `all_ranks`. They may be collective only with
    `all_ranks`. Their arguments are the same on every rank. An exception raised by a callback ends the run on all
    ranks.
    """

    all_ranks: ClassVar[bool] = False

    def on_start(self, start: RunStart) -> None:
        """Called before the first step."""

    def on_step(self, record: StepRecord) -> None:
        """Called after every optimiser step."""

    def on_validation(self, record: ValidationRecord) -> None:
        """Called after every validation."""

    def on_epoch(self, summary: EpochSummary) -> None:
        """Called after every epoch, and after its validation if there is one."""

    def on_snapshot(self, step: int) -> None:
        """Called once a snapshot after `step` optimiser steps is taken; its background write may still be running."""

    def on_end(self, outcome: Outcome | None) -> None:
        """Called at the end of the run; `outcome` is None for a run that was stopped or has failed."""


@dataclass(frozen=True)
class Callbacks:
    """Callbacks of this rank, in calling order."""

    called: tuple[Callback, ...] = ()

    def start(self, start: RunStart) -> None:
        """Call `on_start`."""
        for callback in self.called:
            callback.on_start(start)

    def step(self, record: StepRecord) -> None:
        """Call `on_step`."""
        for callback in self.called:
            callback.on_step(record)

    def validation(self, record: ValidationRecord) -> None:
        """Call `on_validation`."""
        for callback in self.called:
            callback.on_validation(record)

    def epoch(self, summary: EpochSummary) -> None:
        """Call `on_epoch`."""
        for callback in self.called:
            callback.on_epoch(summary)

    def snapshot(self, step: int) -> None:
        """Call `on_snapshot`."""
        for callback in self.called:
            callback.on_snapshot(step)

    def end(self, outcome: Outcome | None) -> None:
        """Call `on_end`."""
        for callback in self.called:
            callback.on_end(outcome)


def of_rank(callbacks: Sequence[Callback], is_root: bool) -> Callbacks:
    """Select the callbacks that are called on this rank. Raises `TypeError` for an object that is not a callback."""
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(f"callbacks: {callback!r} is not a pnode_dist.Callback")
    return Callbacks(tuple(callback for callback in callbacks if is_root or callback.all_ranks))
