"""Outcome of a training run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """Result of a run: the mean loss of the last epoch, and the figures and the epoch of the kept parameters."""

    steps: int
    seconds: float
    loss: float
    kept_epoch: int
    figures: dict[str, float]
