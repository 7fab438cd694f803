"""A batch of solves as one solve: the batch is an axis of the state, before all others.

Runge-Kutta steps of given sizes are made of evaluations of f and of sums, so that members of a batch do not see one
another. Steps with error control, and equations that are solved to a tolerance, would depend on the others.
"""

from __future__ import annotations

from typing import Any

import torch

from pnode_dist.ode.rhs.evaluation import Function


class Batched:
    """f of every member of a batch, by `torch.func.vmap`."""

    holds_values_of_func = True
    """That what f reads is reached through this, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, func: Function) -> None:
        self.func = func

    def __call__(self, t: torch.Tensor, state: Any, *args: Any) -> Any:
        """du/dt of all members. Raises `RuntimeError` where f does what has no form for batches."""
        members = torch.func.vmap(lambda u: self.func(t, u, *args))
        return members(state)
