"""The end of a training run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the last epoch's mean loss, the figures of the parameters that were kept and their epoch."""

    steps: int
    seconds: float
    loss: float
    kept_epoch: int
    figures: dict[str, float]
