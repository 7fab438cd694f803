"""A batch of solves as one solve, with the batch as the first axis of the state.

Explicit Runge-Kutta steps of given sizes consist of evaluations of f and of sums, so the members of a batch are
independent. With error control, or with equations solved to a tolerance, they would depend on one another.
"""

from __future__ import annotations

from typing import Any

import torch

from pnode_dist.ode.rhs.between import Mapped
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.observed import Observed


class Batched:
    """f of every member of a batch, by `torch.func.vmap`."""

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, func: Function) -> None:
        self.func = func

    def __call__(self, t: torch.Tensor, state: Any, *args: Any) -> Any:
        """Return the values of all members. Raises `RuntimeError` if an operation of f has no rule for batches."""
        members = torch.func.vmap(lambda u: self.func(t, u, *args))
        return members(state)


def batched(func: Function) -> Function:
    """Return the right-hand side of a batch of states, with the observations and the maps of all members."""
    if isinstance(func, Observed):
        return Observed(batched(func.func), Batched(func.observe))
    if isinstance(func, Mapped):
        return Mapped(Batched(func.func), Batched(func.between))
    return Batched(func)
