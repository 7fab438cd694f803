"""Sharded parameters, of which every state rank holds a part: their layout, and state_dicts with whole tensors.

A module declares them in an attribute `parameter_shards`, which maps the name of each to a `Shard`. The part on a rank
is an ordinary parameter, whose gradient is complete on that rank. Optimisers need no change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError


class Split(Protocol):
    """A vector of `size` entries split over the state ranks, such as a `DensePartition`."""

    @property
    def size(self) -> int: ...

    @property
    def owned(self) -> tuple[int, int]: ...

    def gather(self, local: torch.Tensor) -> torch.Tensor | None:
        """Return the whole vectors `[..., size]` on the first state rank, None elsewhere. Collective."""
        ...


@dataclass(frozen=True)
class Shard:
    """The part of a whole tensor on each rank: its owned range of `partition` along `axis`."""

    partition: Split
    axis: int

    @property
    def length(self) -> int:
        """The length of this rank's part along the axis."""
        begin, end = self.partition.owned
        return end - begin

    def whole_shape(self, part: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of the whole tensor of `part`."""
        return (*part.shape[: self.axis], self.partition.size, *part.shape[self.axis + 1 :])

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part as a view."""
        return whole.narrow(self.axis, self.partition.owned[0], self.length)

    def gather(self, part: torch.Tensor) -> torch.Tensor | None:
        """Return the whole tensor on the first state rank, None elsewhere. Collective on the partition."""
        whole = self.partition.gather(part.movedim(self.axis, -1))
        return None if whole is None else whole.movedim(-1, self.axis).contiguous()


@runtime_checkable
class Sharded(Protocol):
    """A module with sharded parameters."""

    parameter_shards: Mapping[str, Shard]


def shards_of(module: nn.Module) -> dict[str, Shard]:
    """Return the shards of all sharded parameters in `module`, by their names in `named_parameters`."""
    return {
        f"{prefix}.{name}" if prefix else name: shard
        for prefix, child in module.named_modules()
        if isinstance(child, Sharded)
        for name, shard in child.parameter_shards.items()
    }


def gather_state_dict(module: nn.Module, mesh: Mesh) -> dict[str, torch.Tensor] | None:
    """`module.state_dict()` with whole tensors for sharded parameters, on each replica's first state rank.

    None on the others. It fits the module that shards nothing, on any number of ranks. Buffers are that rank's own.
    Collective on the state ranks.
    """
    shards = shards_of(module)
    gathered = {
        name: shards[name].gather(value) if name in shards else value for name, value in module.state_dict().items()
    }
    if mesh.state_rank != 0:
        return None
    return {name: value for name, value in gathered.items() if value is not None}


def load_whole_state_dict(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """`module.load_state_dict(state)` of whole tensors, of which a rank takes its part of sharded ones. Not collective.

    From a file, `torch.load(path, mmap=True)` has a rank read no more than that.
    Raises `ConfigurationError` if a sharded parameter has another size.
    """
    shards, own = shards_of(module), dict(state)
    for name, value in module.named_parameters():
        if name in shards and name in own:
            wanted = shards[name].whole_shape(value)
            if own[name].shape != wanted:
                raise ConfigurationError(
                    f"{name} has shape {tuple(own[name].shape)}: must be {wanted}, that of the whole"
                )
            own[name] = shards[name].part_of(own[name])
    module.load_state_dict(own)
