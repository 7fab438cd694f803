"""The map between steps: a function m(t, u) whose value takes the place of the state after each step.

A right-hand side and its map travel together as one `Mapped`: both may hold parameters and values that the backward
pass restores, and both have tangents.
"""

from __future__ import annotations

from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import Method
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import Parts

NAME = "between_steps"
"""The name of the map in errors."""


class MapOfParts:
    """A map with its value as a tuple of tensors."""

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, function: Function, is_tuple: bool) -> None:
        self.function, self.is_tuple = function, is_tuple

    def __call__(self, t: torch.Tensor, parts: Parts, *args: Any) -> Parts:
        """Return the parts of the new state. Collective if the user's function is.

        Raises `TypeError` or `ValueError` for a value that is not like the state.
        """
        value = self.function(t, parts if self.is_tuple else parts[0], *args)
        found = tuple(value) if self.is_tuple and isinstance(value, tuple | list) else (value,)
        if len(found) != len(parts) or not all(isinstance(part, torch.Tensor) for part in found):
            wanted = f"a tuple of {len(parts)} tensors" if self.is_tuple else "a tensor"
            raise TypeError(f"{NAME} must return {wanted} like u, got {type(value).__name__}")
        for new, old in zip(found, parts, strict=True):
            if new.shape != old.shape:
                raise ValueError(
                    f"{NAME} returned shape {tuple(new.shape)} for a state of shape {tuple(old.shape)}: it must be the "
                    "shape of u"
                )
            if not new.dtype.is_floating_point:
                raise TypeError(f"{NAME} returned {new.dtype} for a state of {old.dtype}: it must be like u")
        return found


class Mapped:
    """A right-hand side, with the map between the steps of its solves."""

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, func: Function, between: Function) -> None:
        self.func, self.between = func, between

    def __call__(self, t: torch.Tensor, state: Any, *args: Any) -> Any:
        """Return du/dt."""
        return self.func(t, state, *args)


class MapBesideIntegral:
    """A map of the state (u, integral): that of u, and the integral as it is."""

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, between: Function, parts: int) -> None:
        self.between, self.parts = between, parts
        self.function = function_of(between)

    def __call__(self, t: torch.Tensor, state: Parts, *args: Any) -> Parts:
        """Return the parts of the new state, and the integrals. Collective if the map is."""
        return (*self.between(t, state[: self.parts], *args), *state[self.parts :])


def function_of(between: Function) -> Function:
    """Return the user's function that a map of parts calls, which is the same one in all solves."""
    found: Function = getattr(between, "function", between)
    return found


def mapped(func: Function, between: Function | None, is_tuple: bool) -> Function:
    """Return `func` with a map between its steps, or `func` itself. Raises `TypeError` if the map is no function."""
    if between is None:
        return func
    if not callable(between):
        raise TypeError(f"{NAME} must be callable as {NAME}(t, u, *args), got {type(between).__name__}")
    return Mapped(func, MapOfParts(between, is_tuple))


def check_one_step(method: Method) -> None:
    """Raise `ConfigurationError` for a method that takes a step from earlier states too, which a map would change."""
    if method.family == "bdf":
        raise ConfigurationError(
            f"{NAME}: method = {method.name!r} takes each step from several earlier states, which the map does not "
            "change: must be None, or choose a method of one step such as cn"
        )
