"""The arguments of `odeint_adjoint` that decide which tensors of func get a gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.parameters import find_parameters


def adjoint_parameters(func: Any, given: Any) -> tuple[torch.Tensor, ...] | None:
    """Return the tensors of `adjoint_params` that require a gradient; None if func is a module and none are given.

    Raises `ConfigurationError` for anything but tensors, for a func that is no module without `adjoint_params`, and if
    they leave out a tensor of func.
    """
    if given is None:
        if isinstance(func, nn.Module):
            return None
        raise ConfigurationError(
            "func must be an instance of nn.Module, or adjoint_params must hold its parameters: () if it has none"
        )
    params = _tensors(given)
    named_here = {id(tensor) for tensor in params}
    left_out = [tensor for tensor in find_parameters(func, ()) if id(tensor) not in named_here]
    if left_out:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in left_out)
        raise ConfigurationError(
            f"adjoint_params: leaves out {len(left_out)} tensors of func that require a gradient, of shapes {shapes}: "
            "name them too, or call requires_grad_(False) on them"
        )
    return tuple(tensor for tensor in params if tensor.requires_grad)


def _tensors(given: Any) -> tuple[torch.Tensor, ...]:
    wanted = "must be a sequence of tensors, such as func.parameters()"
    if isinstance(given, torch.Tensor) or not isinstance(given, Iterable):
        raise ConfigurationError(f"adjoint_params: {wanted}, got {type(given).__name__}")
    params = tuple(given)
    for entry in params:
        if not isinstance(entry, torch.Tensor):
            raise ConfigurationError(f"adjoint_params: {wanted}, got an entry of type {type(entry).__name__}")
    return params
