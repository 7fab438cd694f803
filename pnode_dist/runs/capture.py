"""From a training that runs to a snapshot of it, and back."""

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
from pnode_dist.runs.rank_state import RankState, as_plain, for_rank, put_back
from pnode_dist.runs.snapshot import Best, Position, Snapshot, Tensors


@dataclass(frozen=True)
class Trained:
    """What training changes: the model, its optimiser, and the schedule of the learning rate if there is one."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: LRScheduler | None


def capture(trained: Trained, position: Position, best: Best | None, own: RankState, mesh: Mesh) -> Snapshot | None:
    """A copy of all of it, on rank 0, None elsewhere. `own` is this rank's state. Collective on the world.

    What is the same on all ranks is rank 0's; sharded parameters, and what belongs to them, come from its replica.
    """
    ranks = mesh.gather_object(own)
    if mesh.replica > 0:
        return None
    shards = shards_of(trained.model)
    parameters = dict(trained.model.named_parameters())

    def whole(name: str, value: torch.Tensor) -> torch.Tensor | None:
        # What an optimiser keeps of a parameter lies as the parameter does, but for counts and the like.
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
    """Put a snapshot back, on any number of ranks; the best parameters so far, of which this rank's part.

    Raises `ConfigurationError` if it is of another model or optimiser. Not collective.
    """
    shards = shards_of(trained.model)
    parameters = dict(trained.model.named_parameters())
    _check_fits(snapshot, parameters, shards)

    def part(name: str, value: torch.Tensor) -> torch.Tensor:
        whole = shards[name].whole_shape(parameters[name]) if name in shards else None
        own = shards[name].part_of(value) if value.shape == whole else value
        # Not a view of the file.
        return own.clone(memory_format=torch.contiguous_format)

    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(part(name, snapshot.parameters[name]))
        put_back(for_rank(snapshot.ranks, snapshot.state_ranks, mesh), trained.model)
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
    """An entry of an optimiser's state with its tensors changed, also those in lists, as LBFGS keeps them."""
    if isinstance(entry, torch.Tensor):
        return change(entry)
    if isinstance(entry, list | tuple):
        return type(entry)(_mapped(value, change) for value in entry)
    if isinstance(entry, dict):
        return {key: _mapped(value, change) for key, value in entry.items()}
    return entry


def _on_device(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    # Counts of steps stay on the host, where optimisers keep them.
    return value.to(parameter.device) if value.dim() > 0 else value


def _check_fits(snapshot: Snapshot, parameters: Mapping[str, torch.Tensor], shards: Mapping[str, Shard]) -> None:
    if snapshot.parameters.keys() != parameters.keys():
        raise ConfigurationError("the snapshot holds other parameters than the configured model has")
    for name, value in parameters.items():
        shape = shards[name].whole_shape(value) if name in shards else tuple(value.shape)
        found = tuple(snapshot.parameters[name].shape)
        if found != shape:
            raise ConfigurationError(f"the snapshot's {name} has shape {found}, in the configured model {shape}")
