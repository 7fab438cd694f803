"""A solve under transforms of `torch.func` and in forward mode, where f holds wrapped tensors or dual tensors.

Every tensor that is differentiated or batched becomes an input of the solve. The solve gets the plain values below all
transforms, and binds them to the names from which f reads its tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.autograd.call import Asked, Call, Prepare, with_replaced
from pnode_dist.ode.autograd.transforms import (
    bare,
    is_batched,
    is_followed,
    is_followed_at_any_level,
    requires_gradient,
)
from pnode_dist.ode.recomputation.carried import Carried
from pnode_dist.ode.recomputation.surroundings import Surroundings
from pnode_dist.ode.rhs.compute_dtype import compute_copies
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import Parts, State, StateLayout, layout_of
from pnode_dist.ode.rhs.parameters import Parameters, find_parameters


def transformed(
    func: Function,
    u0: State,
    t: Any,
    args: tuple[Any, ...],
    params: tuple[torch.Tensor, ...],
    compute_dtype: torch.dtype | None,
    ranks: int,
    prepare: Prepare,
    random: bool,
    folds: bool,
    only_last: bool,
) -> tuple[Call, StateLayout, tuple[torch.Tensor, ...]]:
    """Return the solve as a function of all tensors under a transform, the layout of its state, and its inputs.

    Evaluates f once, to detect tensors that the search for parameters has missed. Collective if f is. Raises
    `ConfigurationError` if there are any, or if f holds one in a place that cannot be rebound.
    """
    layout, parts = layout_of(u0, compute_dtype)
    parameters = find_parameters(func, (*args, *params), is_followed)
    times = (t,) if isinstance(t, torch.Tensor) and is_followed(t) else ()
    tensors = (*parts, *parameters, *times)
    surroundings = Surroundings.now(func, args, layout.device)
    bindings = surroundings.bindings
    held = ((tensor, id(tensor) in bindings.buffers) for tensor in bindings.tensors if not is_followed(tensor))
    carried = Carried(bindings, held, layout.device, random)
    reached = {id(tensor) for tensor in bindings.tensors}
    for parameter in parameters:
        if id(parameter) not in reached:
            raise ConfigurationError(
                f"params: a tensor of shape {tuple(parameter.shape)} is followed by a transform of torch, and func "
                "reaches it by a name that is not found: hold it in a module, a closure or args"
            )
    asked = Asked(
        func,
        args,
        len(parts),
        layout.is_tuple,
        Parameters(parameters, shares_graph=False),
        bool(times),
        ranks,
        prepare,
        surroundings,
        carried,
        transformed=True,
        folds=folds,
        only_last=only_last,
    )
    if not any(map(is_batched, tensors)):
        _look(asked, layout, parts, t)
    return Call(asked, torch.is_grad_enabled() and any(map(requires_gradient, tensors))), layout, tensors


def _look(asked: Asked, layout: StateLayout, parts: Parts, t: Any) -> None:
    """Raise `ConfigurationError` if a transform follows the value of f although it follows none of f's inputs."""
    replaced = {id(parameter): bare(parameter) for parameter in asked.parameters}
    start = bare(torch.as_tensor(t[0])).to(layout.device, layout.compute_dtype)
    assert asked.surroundings is not None
    with torch.enable_grad(), asked.carried.aside(), asked.surroundings.bindings.installed(replaced):
        args = with_replaced(asked.args, replaced)
        copies = compute_copies(asked.func, args, layout.compute_dtype)
        with copies.in_place():
            state = layout.as_state([bare(part).to(layout.compute_dtype) for part in parts])
            value = asked.func(start, state, *copies.args)
    for part in value if isinstance(value, tuple | list) else (value,):
        if isinstance(part, torch.Tensor) and is_followed_at_any_level(part):
            raise ConfigurationError(
                "func depends on a tensor that is followed by a transform of torch and was not found among its "
                "parameters: hold it in a module, a closure or args"
            )
