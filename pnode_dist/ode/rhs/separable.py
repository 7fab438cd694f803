"""A right-hand side of positions and momenta, whose two parts can be evaluated by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import Method
from pnode_dist.ode.rhs.layout import Parts, StateLayout

Part = Callable[..., Any]
POSITIONS, MOMENTA = 0, 1
"""The halves of a state of pairs (q, p): the parts with even and with odd numbers."""


class Separable(nn.Module):
    """The right-hand side dq/dt = `position(t, p, *args)`, dp/dt = `momentum(t, q, *args)` of a state (q, p).

    Each part is a function or a module, and gets and returns one tensor. Methods of the family `symplectic` evaluate
    only the part that they need. All others evaluate both.
    """

    def __init__(self, *, position: Part, momentum: Part) -> None:
        super().__init__()
        self.position, self.momentum = position, momentum
        for name in ("position", "momentum"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be callable as {name}(t, {'p' if name == 'position' else 'q'})")

    def forward(self, t: torch.Tensor, u: tuple[torch.Tensor, torch.Tensor], *args: Any) -> Parts:
        """Return (dq/dt, dp/dt). Collective if the parts are."""
        q, p = u
        return self.position(t, p, *args), self.momentum(t, q, *args)


class Half:
    """One half of a `Separable` as a function of the whole state. The other half of its value has no meaning."""

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, func: Separable, half: int) -> None:
        self.func, self.half = func, half

    def __call__(self, t: torch.Tensor, u: tuple[torch.Tensor, torch.Tensor], *args: Any) -> Parts:
        """Return the derivative of one half, and a tensor of the right shape for the other one."""
        q, p = u
        if self.half == POSITIONS:
            return self.func.position(t, p, *args), p
        return q, self.func.momentum(t, q, *args)


def halves_of(func: Any) -> tuple[Any, Any]:
    """Return the functions to evaluate for the derivative of positions, and for that of momenta."""
    return (Half(func, POSITIONS), Half(func, MOMENTA)) if isinstance(func, Separable) else (func, func)


def check_pairs(layout: StateLayout, method: Method, tangents: bool) -> None:
    """Raise `ConfigurationError` for a state that is no pair (q, p), if the method needs one.

    `tangents`: the state is followed by as many parts of its tangents.
    """
    if method.family != "symplectic":
        return
    shapes = layout.shapes
    pairs = len(shapes) % 2 == 0 and all(q == p for q, p in zip(shapes[::2], shapes[1::2], strict=True))
    if not (layout.is_tuple and pairs and (tangents or len(shapes) == 2)):
        found = f"a tuple of the shapes {', '.join(map(str, shapes))}" if layout.is_tuple else "one tensor"
        raise ConfigurationError(
            f"method = {method.name!r}: u0 must be a pair (q, p) of two tensors of one shape, got {found}"
        )
