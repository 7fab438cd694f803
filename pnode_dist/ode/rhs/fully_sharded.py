"""Right-hand sides with parameters that torch.distributed.fsdp.fully_shard has spread over replicas.

The hooks of `fully_shard` gather parameters for one evaluation, and sum gradients in the backward pass of the outer
graph, which does not contain the evaluations of a solve. Applied to the `NeuralODE` itself, the hooks gather once for a
solve, and work.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.parameters import find_modules


def refuse_fully_sharded(func: Any, args: tuple[Any, ...], parameters: tuple[torch.Tensor, ...]) -> None:
    """Raise `ConfigurationError` for a gradient with respect to parameters that `fully_shard` has spread."""
    fsdp, distributed = sys.modules.get("torch.distributed.fsdp"), sys.modules.get("torch.distributed.tensor")
    if fsdp is None or distributed is None:
        return
    if not any(isinstance(parameter, distributed.DTensor) for parameter in parameters):
        return
    inside = (module for found in find_modules(func, args) for module in found.modules())
    if any(isinstance(module, fsdp.FSDPModule) for module in inside):
        raise ConfigurationError(
            "func is sharded by fully_shard, which gathers parameters for single evaluations only: apply fully_shard "
            "to the NeuralODE, or to the module that calls odeint, and to nothing inside func"
        )
