"""Parameters of which every state rank holds a part: where the parts lie in the whole, and state_dicts of the whole.

A module says so with an attribute `parameter_shards`, a `Shard` for each such parameter by its name. What a rank keeps
of a parameter is an ordinary parameter, whose gradient is complete on that rank; optimisers need not know of it.
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
    """A vector of `size` entries split over the state ranks, as `DensePartition` is one."""

    @property
    def size(self) -> int: ...

    @property
    def owned(self) -> tuple[int, int]: ...

    def gather(self, local: torch.Tensor) -> torch.Tensor | None:
        """The whole vectors `[..., size]` on the first state rank, None elsewhere. Collective on the state ranks."""
        ...


@dataclass(frozen=True)
class Shard:
    """Each rank's part of a whole tensor: the range that `partition` gives it along `axis`."""

    partition: Split
    axis: int

    @property
    def length(self) -> int:
        """How much this rank has of the axis."""
        begin, end = self.partition.owned
        return end - begin

    def whole_shape(self, part: torch.Tensor) -> tuple[int, ...]:
        """The shape of the tensor that `part` is of."""
        return (*part.shape[: self.axis], self.partition.size, *part.shape[self.axis + 1 :])

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part, a view."""
        return whole.narrow(self.axis, self.partition.owned[0], self.length)

    def gather(self, part: torch.Tensor) -> torch.Tensor | None:
        """The whole tensor on the first state rank, None elsewhere. Collective on the partition's communicator."""
        whole = self.partition.gather(part.movedim(self.axis, -1))
        return None if whole is None else whole.movedim(-1, self.axis).contiguous()


@runtime_checkable
class Sharded(Protocol):
    """A module that has sharded parameters of its own."""

    parameter_shards: Mapping[str, Shard]


def shards_of(module: nn.Module) -> dict[str, Shard]:
    """The shards of all sharded parameters in `module`, by the names that `named_parameters` has for them."""
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
