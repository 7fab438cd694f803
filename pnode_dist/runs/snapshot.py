"""Snapshots: the complete state needed to resume a run without a difference, and its file format."""

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
    """Position of a run after `step` optimiser steps, in epoch `epoch`.

    `losses` are those of the completed batches of this epoch, `seconds` is the training time, `loss` the mean loss of
    the previous epoch, `figures` are those of the last validation, and `metrics` is the size of the metrics file in
    bytes.
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
    """Model `state_dict` with the smallest headline figure so far: whole in a snapshot, this rank's part elsewhere."""

    epoch: int
    figures: dict[str, float]
    state: Tensors


@dataclass(frozen=True)
class Snapshot:
    """State of a run between two optimiser steps.

    Parameters and their optimiser state are whole tensors, by parameter name. `ranks` holds the state specific to each
    rank, and `state_ranks` is the number of ranks that share a state.
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
        """Write the snapshot as a torch file that can be loaded without executing code."""
        contents = {name: getattr(self, name) for name in self.__dataclass_fields__}
        contents["position"] = {**asdict(self.position), "losses": list(self.position.losses)}
        contents["best"] = None if self.best is None else vars(self.best)
        contents["ranks"] = [vars(state) for state in self.ranks]
        torch.save({"version": VERSION, **contents}, file)


def from_contents(contents: Mapping[str, Any]) -> Snapshot:
    """Build a snapshot from the result of `torch.load`. Raises `ValueError` if it has another version."""
    fields = dict(contents)
    if fields.pop("version", None) != VERSION:
        raise ValueError("it was written by another version of pnode_dist")
    position = fields["position"]
    fields["position"] = Position(**{**position, "losses": tuple(position["losses"])})
    fields["best"] = None if fields["best"] is None else Best(**fields["best"])
    fields["ranks"] = [RankState(**state) for state in fields["ranks"]]
    return Snapshot(**fields)
