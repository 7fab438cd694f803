"""Tangents of a solve: how its states change along a direction in initial state and parameters.

The tangent of a Runge-Kutta or theta step is the same step of the equations together with their linearisation,
dv/dt = (df/du) v + (df/dtheta) dtheta: the two are solved as one state. What comes out is the exact derivative of the
numbers computed, and is itself differentiable: its gradient is a Hessian-vector product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.compute_type import ComputeCopies
from pnode_dist.ode.evaluation import Function
from pnode_dist.ode.layout import layout_of
from pnode_dist.ode.split import SplitFunction

Parts = tuple[torch.Tensor, ...]


class WithTangent:
    """f and its derivative along a direction, as a right-hand side of the state (u, v)."""

    holds_values_of_func = True
    """That what f reads is reached through this, see `pnode_dist.ode.bindings`."""

    def __init__(self, func: Function, is_tuple: bool, direction: Mapping[torch.Tensor, torch.Tensor]) -> None:
        self.func, self.is_tuple = func, is_tuple
        self.parameters = tuple(direction)
        self.tangents = tuple(direction.values())

    def __call__(self, t: torch.Tensor, state: Parts, *args: Any) -> Parts:
        """f(t, u) and (df/du) v + (df/dtheta) dtheta, part by part. Collective if f's backward is."""
        half = len(state) // 2
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            # Of a leaf that nobody differentiates the derivative is wanted all the same.
            inputs = tuple(part if part.requires_grad else part.detach().requires_grad_() for part in state[:half])
            values = self.func(t, inputs if self.is_tuple else inputs[0], *args)
            outputs = tuple(values) if self.is_tuple else (values,)
            rates = self._along(outputs, inputs, state[half:], differentiable)
        found = (*outputs, *rates)
        return found if differentiable else tuple(part.detach() for part in found)

    def _along(self, outputs: Parts, inputs: Parts, tangents: Parts, differentiable: bool) -> Parts:
        # J^T w is linear in w, and its derivative along a vector is J times that.
        probes = tuple(torch.zeros_like(out, requires_grad=True) for out in outputs)
        reached = [number for number, out in enumerate(outputs) if out.requires_grad]
        rates = [torch.zeros_like(out) for out in outputs]
        if not reached:
            return tuple(rates)
        # Hooks on parameters are for the gradient of the whole solve.
        with hooks_aside(self.parameters):
            pulled = torch.autograd.grad(
                [outputs[number] for number in reached],
                (*inputs, *self.parameters),
                [probes[number] for number in reached],
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        pairs = zip(pulled, (*tangents, *self.tangents), strict=True)
        linear = [(value, tangent.to(value.dtype)) for value, tangent in pairs if value.requires_grad]
        if linear:
            pushed = torch.autograd.grad(
                [value for value, _ in linear],
                [probes[number] for number in reached],
                [tangent for _, tangent in linear],
                create_graph=differentiable,
                allow_unused=True,
                materialize_grads=True,
            )
            for number, rate in zip(reached, pushed, strict=True):
                rates[number] = rate
        return tuple(rates)


def in_compute_type(func: Function, copies: ComputeCopies) -> Function:
    """A right-hand side whose derivative, if it has one along a direction, is that by the copies of parameters."""
    if isinstance(func, SplitFunction) and isinstance(func.explicit, WithTangent):
        return SplitFunction(
            implicit=in_compute_type(func.implicit, copies), explicit=in_compute_type(func.explicit, copies)
        )
    if not isinstance(func, WithTangent):
        return func
    direction = dict(zip(copies.of(func.parameters), func.tangents, strict=True))
    return WithTangent(func.func, func.is_tuple, direction)


def with_tangent(func: Function, is_tuple: bool, direction: Mapping[torch.Tensor, torch.Tensor]) -> Function:
    """The right-hand side of a state and its tangent; in two parts if `func` is."""
    if isinstance(func, SplitFunction):
        return SplitFunction(
            implicit=WithTangent(func.implicit, is_tuple, direction),
            explicit=WithTangent(func.explicit, is_tuple, direction),
        )
    return WithTangent(func, is_tuple, direction)


def checked_direction(
    direction: Mapping[torch.Tensor, torch.Tensor] | None,
) -> Mapping[torch.Tensor, torch.Tensor]:
    """The tangents of parameters, none if there are none. Raises `ConfigurationError` for a shape that does not fit."""
    for parameter, tangent in (direction or {}).items():
        if tangent.shape != parameter.shape or not parameter.requires_grad:
            raise ConfigurationError(
                f"parameter_tangents: shape {tuple(tangent.shape)} for a parameter of shape {tuple(parameter.shape)}: "
                "must be the same, and the parameter must require a gradient"
            )
    return direction or {}


def joined(u0: Any, tangent: Any) -> tuple[Parts, bool]:
    """State and tangent as one tuple of parts, and whether the state is a tuple. Raises `ConfigurationError`."""
    layout, parts = layout_of(u0)
    of_tangent, tangents = layout_of(tangent)
    if of_tangent.shapes != layout.shapes:
        raise ConfigurationError(f"u0_tangent: shapes {of_tangent.shapes} for a state of {layout.shapes}")
    return (*parts, *(part.to(layout.device, layout.dtype) for part in tangents)), layout.is_tuple


@contextmanager
def hooks_aside(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Keep hooks on tensors from running: they are for the gradient of the whole solve, not for that of each stage."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks
