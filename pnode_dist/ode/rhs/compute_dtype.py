"""Copies of parameters and buffers in the floating type that f computes in.

The parameters of the model keep their own type. States, adjoints and sums of parameter gradients are in the type of the
state, by default no narrower than u0: only f and its products with vectors need a fast type. The copies are made once
for a solve. (P. Micikevicius et al.: Mixed precision training, ICLR (2018), keeps master weights in the same way.)
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
    """A parameter or buffer that `module` holds under `name`, and the copy that replaces it during evaluations."""

    module: nn.Module
    name: str
    original: torch.Tensor
    copy: torch.Tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Bind `tensor` to the module's name. It may be no `Parameter`, like the original."""
        module = self.module
        (module._parameters if self.name in module._parameters else module._buffers)[self.name] = tensor  # type: ignore[assignment]


@dataclass(frozen=True)
class ComputeCopies:
    """The copies of a right-hand side's tensors, empty if all tensors have the right type.

    `by_original` maps the identity of an original to the original and its copy. `held` are the copies for modules, and
    `args` the extra arguments with copies.
    """

    by_original: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    held: tuple[Held, ...]
    args: tuple[Any, ...]

    def of(self, tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the copy of each tensor, or the tensor itself if it has none."""
        return tuple(self.by_original.get(id(tensor), (tensor, tensor))[1] for tensor in tensors)

    @contextmanager
    def in_place(self, writes_back: bool = True) -> Iterator[None]:
        """Bind the copies to their modules within the context. `writes_back` copies f's changes to the originals."""
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
    """Copy the tensors that `func` and its extra arguments compute with, in `dtype`.

    These are parameters and buffers of modules that `func` is or holds, and tensors among `args`. Tensors that a plain
    function closes over cannot be replaced.
    """
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def copy_of(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype.to_complex() if tensor.is_complex() else dtype
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.dtype == wanted:
            return tensor
        if id(tensor) not in copies:
            copy = tensor.detach().to(wanted)
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
