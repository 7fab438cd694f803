"""All that a run needs to go on as if it had never stopped, and its form in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import torch

from pnode_dist.runs.rank_state import RankState

VERSION = 1
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Position:
    """How far a run has come: `step` optimiser steps, and in `epoch` as many batches as it has `losses` of.

    `seconds` of training, `loss` the mean one of the epoch before, `figures` those of the last validation, and
    `metrics` the size of the metrics file in bytes.
    """

    step: int = 0
    epoch: int = 1
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    loss: float = math.nan
    figures: dict[str, float] = field(default_factory=dict)
    metrics: int = 0


@dataclass(frozen=True)
class Best:
    """The model's `state_dict` with the least headline figure so far, whole in a snapshot, of this rank elsewhere."""

    epoch: int
    figures: dict[str, float]
    state: Tensors


@dataclass(frozen=True)
class Snapshot:
    """A run between two optimiser steps.

    Parameters and what the optimiser keeps of each of them are whole tensors, by the parameters' names; `ranks` is what
    every rank had of its own, `state_ranks` how many of them shared a state.
    """

    position: Position
    parameters: Tensors
    optimiser: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    schedule: dict[str, Any] | None
    best: Best | None
    ranks: list[RankState]
    state_ranks: int

    def save(self, file: BinaryIO) -> None:
        """Write it as torch writes tensors, so that loading runs no code."""
        contents = {name: getattr(self, name) for name in self.__dataclass_fields__}
        contents["position"] = {**asdict(self.position), "losses": list(self.position.losses)}
        contents["best"] = None if self.best is None else vars(self.best)
        contents["ranks"] = [vars(state) for state in self.ranks]
        torch.save({"version": VERSION, **contents}, file)


def from_contents(contents: Mapping[str, Any]) -> Snapshot:
    """The snapshot of what `torch.load` has read. Raises `ValueError` if it is of another version."""
    fields = dict(contents)
    if fields.pop("version", None) != VERSION:
        raise ValueError("it was written by another version of pnode_dist")
    position = fields["position"]
    fields["position"] = Position(**{**position, "losses": tuple(position["losses"])})
    fields["best"] = None if fields["best"] is None else Best(**fields["best"])
    fields["ranks"] = [RankState(**state) for state in fields["ranks"]]
    return Snapshot(**fields)
