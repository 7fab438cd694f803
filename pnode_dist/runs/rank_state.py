"""Training state specific to each rank: random generator states, and the buffers changed by training."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError

_FORMAT = "MT19937"


@dataclass(frozen=True)
class RankState:
    """States of the torch, numpy and Python generators, and the changed buffers by name."""

    torch_state: torch.Tensor
    numpy_state: list[Any]
    python_state: list[Any]
    buffers: dict[str, torch.Tensor]


def versions_of_buffers(model: nn.Module) -> dict[str, int]:
    """Return torch's change counter of every buffer, by which `rank_state` detects later changes."""
    return {name: value._version for name, value in model.named_buffers()}


def rank_state(model: nn.Module, built: Mapping[str, int]) -> RankState:
    """Copy this rank's current state. `built` holds the buffer versions at the construction of the model."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    version, internal, gauss_next = random.getstate()
    return RankState(
        torch.get_rng_state(),
        [
            numpy_state["state"]["key"],
            numpy_state["state"]["pos"],
            numpy_state["has_gauss"],
            numpy_state["gauss"],
        ],
        [version, internal, gauss_next],
        {
            name: value.detach().clone()
            for name, value in model.named_buffers()
            if value._version != built.get(name, value._version)
        },
    )


def as_plain(state: RankState) -> RankState:
    """Convert the state to tensors, lists and numbers only, which torch saves without pickling code."""
    keys, *numpy_rest = state.numpy_state
    version, internal, gauss_next = state.python_state
    return RankState(
        state.torch_state,
        [keys.tolist(), *numpy_rest],
        [version, list(internal), gauss_next],
        {name: value.cpu() for name, value in state.buffers.items()},
    )


def restore_rank_state(state: RankState, model: nn.Module) -> None:
    """Restore this rank's state. Raises `ConfigurationError` if the buffers do not match those of the model."""
    torch.set_rng_state(state.torch_state.clone())
    keys, position, has_gauss, gauss = state.numpy_state
    np.random.set_state((_FORMAT, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state.python_state
    random.setstate((version, tuple(internal), gauss_next))
    restore_buffers(state.buffers, model)


def restore_buffers(buffers: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Copy `buffers` into those of the model. Raises `ConfigurationError` if a name or shape does not match."""
    own = dict(model.named_buffers())
    for name, value in buffers.items():
        if name not in own or own[name].shape != value.shape:
            raise ConfigurationError(f"the snapshot has a buffer {name} of shape {tuple(value.shape)}, the model not")
        own[name].copy_(value)


def for_rank(states: Sequence[RankState], state_ranks: int, mesh: Mesh) -> RankState:
    """Select the state to resume this rank from, among the saved `states` of a run with `state_ranks` state ranks.

    On the same mesh each rank resumes from its own state. On another mesh the buffers are those of the first replica.
    They must be the same on all its ranks, as the running statistics of a whole field are. If there are more ranks than
    saved states, random states are assigned to several ranks.
    Raises `ConfigurationError` on another mesh if a buffer differs between ranks of the first replica.
    """
    if (len(states), state_ranks) == (mesh.size, mesh.state_ranks):
        return states[mesh.rank]
    buffers = states[0].buffers
    for name, value in buffers.items():
        if not all(name in other.buffers and _same(other.buffers[name], value) for other in states[:state_ranks]):
            raise ConfigurationError(
                f"the buffer {name} is not the same on the {state_ranks} ranks that shared a state in the snapshot: it "
                "can only go on with as many"
            )
    return replace(states[mesh.rank % len(states)], buffers=buffers)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
