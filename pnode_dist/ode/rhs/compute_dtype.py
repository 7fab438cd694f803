"""Parameters and buffers in the floating type that f computes in, while those of the model keep their own.

A state and its adjoint are in PETSc's scalar type anyway, and parameter gradients are summed in it over the stages and
steps of a solve: only f and its products with vectors need to be fast. The copies are made once for a solve. (P.
Micikevicius et al.: Mixed precision training, ICLR (2018), keeps master weights in the same way.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pnode_dist.ode.rhs.parameters import find_modules


@dataclass(frozen=True)
class Held:
    """A parameter or buffer that `module` holds under `name`, and the copy that stands in for it."""

    module: nn.Module
    name: str
    original: torch.Tensor
    copy: torch.Tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Let the module hold `tensor`, which need not be a `Parameter` where the original is none."""
        module = self.module
        (module._parameters if self.name in module._parameters else module._buffers)[self.name] = tensor  # type: ignore[assignment]


@dataclass(frozen=True)
class ComputeCopies:
    """Originals and their copies by the originals' identity, those that modules hold, and the extra arguments with
    theirs.

    There are none where everything is of the right type as it is.
    """

    by_original: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    held: tuple[Held, ...]
    args: tuple[Any, ...]

    def of(self, tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What stands for each of the tensors while f is evaluated."""
        return tuple(self.by_original.get(id(tensor), (tensor, tensor))[1] for tensor in tensors)

    @contextmanager
    def in_place(self, writes_back: bool = True) -> Iterator[None]:
        """Let the modules hold their copies for a while; with `writes_back` the originals get what f writes there."""
        versions = [held.copy._version for held in self.held]
        for held in self.held:
            held.put(held.copy)
        try:
            yield
        finally:
            for held, version in zip(self.held, versions, strict=True):
                held.put(held.original)
                if writes_back and held.copy._version != version:
                    with torch.no_grad():
                        held.original.copy_(held.copy)


NO_COPIES = ComputeCopies({}, (), ())


def compute_copies(func: Callable[..., Any], args: tuple[Any, ...], dtype: torch.dtype) -> ComputeCopies:
    """Copies of what `func` and its extra arguments compute with, in `dtype`.

    These are parameters and buffers of modules that `func` is or holds, and tensors among `args`. Tensors that a plain
    function closes over cannot be exchanged.
    """
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def copy_of(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        if id(tensor) not in copies:
            copy = tensor.detach().to(dtype)
            copies[id(tensor)] = (
                tensor,
                nn.Parameter(copy, tensor.requires_grad)
                if isinstance(tensor, nn.Parameter)
                else copy.requires_grad_()
                if tensor.requires_grad
                else copy,
            )
        return copies[id(tensor)][1]

    everything = (
        Held(module, name, tensor, copy_of(tensor))
        for root in find_modules(func, args)
        for module in root.modules()
        for name, tensor in (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        )
    )
    held = {(id(one.module), one.name): one for one in everything if one.copy is not one.original}
    return ComputeCopies(
        copies,
        tuple(held.values()),
        tuple(copy_of(arg) if isinstance(arg, torch.Tensor) else arg for arg in args),
    )
