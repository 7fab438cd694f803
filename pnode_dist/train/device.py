"""The device on which the model of a run computes.

Problems hold their data, and compute their losses, in the host's memory. The model takes batches to its device, and
brings its predictions back, so that a problem needs no line for devices.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.odeint import NeuralODE

HOST = torch.device("cpu")


def device_of(name: str, mesh: Mesh) -> torch.device:
    """Return the device of this rank for `[training] device`. Collective on the world.

    `cuda` is the GPU with the number of the rank on its node, counted round again if there are fewer GPUs. `auto` is
    `cuda` if every rank has a GPU, else `cpu`. Raises `ConfigurationError` on all ranks if a rank lacks the device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        lacking = mesh.max(torch.tensor([int(count == 0)]))
        name = "cpu" if lacking.item() else "cuda"
    if name == "cpu":
        return HOST
    index = _local_rank(mesh) % max(count, 1) if name == "cuda" else int(name.removeprefix("cuda:"))

    def check() -> None:
        if index >= count:
            found = f"{count} GPU(s)" if count else "no GPU"
            raise ConfigurationError(
                f"training.device = {name!r}: torch finds {found} on rank {mesh.rank}: must be cpu, auto, or a GPU "
                "that every rank has"
            )

    agreed(mesh, check)
    return torch.device("cuda", index)


def _local_rank(mesh: Mesh) -> int:
    """Return the number of this rank on its node. Collective on the world."""
    if MPI.COMM_WORLD.size != mesh.size:
        # The ranks of torchrun are not connected by MPI.
        return int(os.environ.get("LOCAL_RANK", "0"))
    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    rank = node.rank
    node.Free()
    return rank


def place(model: nn.Module, device: torch.device) -> None:
    """Move a model to `device`. It then takes inputs from the host's memory, and returns outputs to it.

    Its solves take states and arguments from the host too, and leave solutions on the device. Inputs may be tensors,
    containers and dataclasses of them, and objects with a method `to`. Does nothing for the host.
    """
    if device == HOST:
        return
    model.to(device)
    for module in model.modules():
        if module is model or isinstance(module, NeuralODE):
            module.register_forward_pre_hook(_taking(device), with_kwargs=True)
    model.register_forward_hook(lambda module, args, output: _Moved(HOST).of(output))


def _taking(device: torch.device) -> Callable[..., Any]:
    inputs = _Moved(device)

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        inputs.begin()
        return inputs.of(args), inputs.of(kwargs)

    return take


class _Moved:
    """Values on a device. Tensors that the next call has again, such as those of a whole data set, stay there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: dict[int, tuple[Any, int, torch.Tensor]] = {}
        self._now: dict[int, tuple[Any, int, torch.Tensor]] = {}

    def begin(self) -> None:
        """Begin another call: drop the tensors that the last one did not have."""
        self._last, self._now = self._now, {}

    def of(self, value: Any) -> Any:
        """Return a value, and all that it contains, on the device."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, tuple | list):
            parts = [self.of(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, dict):
            return {key: self.of(part) for key, part in value.items()}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            moved = copy.copy(value)
            for field in dataclasses.fields(value):
                # Also those of a frozen one.
                object.__setattr__(moved, field.name, self.of(getattr(value, field.name)))
            return moved
        return value.to(self._device) if hasattr(value, "to") and not isinstance(value, nn.Module) else value

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        if value.requires_grad:
            return value.to(self._device)
        known, version, moved = self._last.get(id(value), (None, 0, value))
        if known is None or known() is not value or version != value._version:
            moved = value.to(self._device)
        self._now[id(value)] = (weakref.ref(value), value._version, moved)
        return moved
