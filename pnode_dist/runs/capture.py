"""Capture of the training state in a snapshot, and its restoration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.distributed.sharding import Shard, shards_of
from pnode_dist.errors import ConfigurationError
from pnode_dist.runs.rank_state import RankState, as_plain, for_rank, restore_rank_state
from pnode_dist.runs.snapshot import Best, Position, Snapshot, Tensors


@dataclass(frozen=True)
class Trained:
    """Objects changed by training: the model, its optimiser, and the learning-rate schedule if there is one."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: LRScheduler | None


def capture(trained: Trained, position: Position, best: Best | None, own: RankState, mesh: Mesh) -> Snapshot | None:
    """Copy the training state into a snapshot on rank 0; return None elsewhere. Collective on the world.

    `own` is this rank's state. Values that are the same on all ranks are taken from rank 0. Sharded parameters and
    their optimiser state are gathered over the replica of rank 0.
    """
    ranks = mesh.gather_object(own)
    if mesh.replica > 0:
        return None
    shards = shards_of(trained.model)
    parameters = dict(trained.model.named_parameters())

    def whole(name: str, value: torch.Tensor) -> torch.Tensor | None:
        # Optimiser state with the shape of its parameter is sharded as the parameter is; counts and the like are not.
        if name in shards and value.shape == parameters[name].shape:
            return shards[name].gather(value.detach().cpu())
        return value.detach().cpu().clone() if mesh.is_root else None

    def all_whole(values: Mapping[str, torch.Tensor]) -> Tensors:
        found = {name: whole(name, value) for name, value in values.items()}
        return {name: value for name, value in found.items() if value is not None}

    kept = {
        name: {
            key: _mapped(entry, lambda tensor, name=name: whole(name, tensor))  # type: ignore[misc]
            for key, entry in trained.optimiser.state[value].items()
        }
        for name, value in parameters.items()
        if value in trained.optimiser.state
    }
    snapshot = Snapshot(
        position,
        all_whole(parameters),
        kept,
        [{key: entry for key, entry in group.items() if key != "params"} for group in trained.optimiser.param_groups],
        None if trained.schedule is None else trained.schedule.state_dict(),
        None if best is None else replace(best, state=all_whole(best.state)),
        [as_plain(state) for state in ranks or ()],
        mesh.state_ranks,
    )
    return snapshot if mesh.is_root else None


def restore(snapshot: Snapshot, trained: Trained, mesh: Mesh) -> Best | None:
    """Restore a snapshot on any number of ranks; return this rank's part of the best parameters so far.

    Raises `ConfigurationError` if the snapshot belongs to another model or optimiser. Not collective.
    """
    shards = shards_of(trained.model)
    parameters = dict(trained.model.named_parameters())
    _check_fits(snapshot, parameters, shards)

    def part(name: str, value: torch.Tensor) -> torch.Tensor:
        whole = shards[name].whole_shape(parameters[name]) if name in shards else None
        own = shards[name].part_of(value) if value.shape == whole else value
        # Clone, because the loaded tensor is a view of the file.
        return own.clone(memory_format=torch.contiguous_format)

    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(part(name, snapshot.parameters[name]))
        restore_rank_state(for_rank(snapshot.ranks, snapshot.state_ranks, mesh), trained.model)
    trained.optimiser.state.clear()
    for name, entries in snapshot.optimiser.items():
        trained.optimiser.state[parameters[name]] = {
            key: _mapped(entry, lambda tensor, name=name: _on_device(part(name, tensor), parameters[name]))  # type: ignore[misc]
            for key, entry in entries.items()
        }
    for group, saved in zip(trained.optimiser.param_groups, snapshot.groups, strict=True):
        group.update(saved)
    if trained.schedule is not None and snapshot.schedule is not None:
        trained.schedule.load_state_dict(snapshot.schedule)
    if snapshot.best is None:
        return None
    return replace(snapshot.best, state={name: part(name, value) for name, value in snapshot.best.state.items()})


def _mapped(entry: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Apply `change` to the tensors of an optimiser-state entry, including those in lists, as LBFGS stores them."""
    if isinstance(entry, torch.Tensor):
        return change(entry)
    if isinstance(entry, list | tuple):
        return type(entry)(_mapped(value, change) for value in entry)
    if isinstance(entry, dict):
        return {key: _mapped(value, change) for key, value in entry.items()}
    return entry


def _on_device(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    # Step counts stay on the host, where optimisers store them.
    return value.to(parameter.device) if value.dim() > 0 else value


def _check_fits(snapshot: Snapshot, parameters: Mapping[str, torch.Tensor], shards: Mapping[str, Shard]) -> None:
    if snapshot.parameters.keys() != parameters.keys():
        raise ConfigurationError("the snapshot holds other parameters than the configured model has")
    for name, value in parameters.items():
        shape = shards[name].whole_shape(value) if name in shards else tuple(value.shape)
        found = tuple(snapshot.parameters[name].shape)
        if found != shape:
            raise ConfigurationError(f"the snapshot's {name} has shape {found}, in the configured model {shape}")
