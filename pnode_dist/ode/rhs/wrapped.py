"""Right-hand sides around another one: the same function in another form of state or time."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.split import MatrixFunction, SplitFunction


class Evaluate(Protocol):
    """The evaluation of a right-hand side `func` at a time and a state of the outer form."""

    def __call__(self, func: Function, t: torch.Tensor, u: Any, args: tuple[Any, ...], /) -> Any: ...


def wrapped(func: Function, evaluate: Evaluate, keeps_matrices: bool = False) -> Function:
    """Return the right-hand side `evaluate(func, t, u, args)`: a module, split or a function like `func`.

    With `keeps_matrices` the part of a Mat stays one.
    """
    if keeps_matrices and isinstance(func, MatrixFunction):
        return func
    if isinstance(func, SplitFunction):
        parts = (wrapped(part, evaluate, keeps_matrices) for part in (func.implicit, func.explicit))
        implicit, explicit = parts
        return SplitFunction(implicit=implicit, explicit=explicit, linear=func.linear).train(func.training)
    if isinstance(func, nn.Module):
        return WrappedModule(func, evaluate).train(func.training)
    if not callable(func):
        return func  # The solve refuses it.
    return WrappedFunction(func, evaluate)


class WrappedFunction:
    """A function around a function."""

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, func: Function, evaluate: Evaluate) -> None:
        self.func, self.evaluate = func, evaluate

    def __call__(self, t: torch.Tensor, u: Any, *args: Any) -> Any:
        """Return du/dt of the outer state."""
        return self.evaluate(self.func, t, u, args)


class WrappedModule(nn.Module):
    """A module around a module, with its parameters and buffers."""

    def __init__(self, func: nn.Module, evaluate: Evaluate) -> None:
        super().__init__()
        self.func, self.evaluate = func, evaluate

    def forward(self, t: torch.Tensor, u: Any, *args: Any) -> Any:
        """Return du/dt of the outer state."""
        return self.evaluate(self.func, t, u, args)
