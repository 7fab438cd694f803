"""A linear map over all ranks as a differentiable operation, given the map and its transpose."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from pnode_dist.system.compile_order import refuse_in_rehearsal
from pnode_dist.system.torch_internals import (
    TRACES_OBJECTS,
    compiler_is_loaded,
    mark_as_not_traced,
    under_functorch,
    unwrap_dead_wrappers,
)

Map = Callable[[torch.Tensor], torch.Tensor]
P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs_of_old_torch(function: Callable[P, R]) -> Callable[P, R]:
    """Exclude a function from tracing by torch.compile if this torch cannot compile exchanges."""
    return function if TRACES_OBJECTS else _outside_graphs(function)


def _outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    disabled: list[Callable[P, R]] = []

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        # torch.compiler.disable loads torch's compiler, which takes seconds.
        if not compiler_is_loaded():
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    mark_as_not_traced(called, "this torch cannot compile exchanges between ranks")
    return called


class _Linear(torch.autograd.Function):
    """A linear map over all ranks. All of its derivatives consist of the map and its transpose.

    Both get plain tensors, with any number of leading axes.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Apply without inspecting `forward` for default arguments, which takes as long as a small halo."""
        if under_functorch():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]

    @staticmethod
    def forward(x: torch.Tensor, forward: Map, transpose: Map) -> torch.Tensor:
        refuse_in_rehearsal()
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.forward, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return linear_map(cotangents[0], ctx.transpose, ctx.forward), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return linear_map(tangents[0], ctx.forward, ctx.transpose)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: torch.Tensor, forward: Map, transpose: Map) -> Any:
        return linear_map(x.movedim(in_dims[0], 0), forward, transpose), 0


@outside_graphs_of_old_torch
def linear_map(x: torch.Tensor, forward: Map, transpose: Map) -> torch.Tensor:
    """Return `forward(x)`, differentiable in reverse and forward mode. Collective if `forward` and `transpose` are.

    For code that is not compiled; `pnode_dist.exchange.compiled.exchange` is for code that is.
    """
    image: torch.Tensor = _Linear.apply(x, forward, transpose)
    return image
