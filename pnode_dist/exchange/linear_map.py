"""A linear map over all ranks as a differentiable operation, given the map and its transpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pnode_dist.system.compile_order import refuse_in_rehearsal
from pnode_dist.system.torch_internals import under_functorch, unwrap_dead_wrappers

Map = Callable[[torch.Tensor], torch.Tensor]


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


def linear_map(x: torch.Tensor, forward: Map, transpose: Map) -> torch.Tensor:
    """Return `forward(x)`, differentiable in reverse and forward mode. Collective if `forward` and `transpose` are.

    For code that is not compiled; `pnode_dist.exchange.compiled.exchange` is for code that is.
    """
    image: torch.Tensor = _apply(x, forward, transpose)
    return image


_apply = _Linear.apply


def keep_out_of_compiled_code() -> None:
    """Exclude linear maps from tracing by torch.compile. Loads torch's compiler."""
    global _apply
    _apply = torch.compiler.disable(_Linear.apply)  # type: ignore[no-untyped-call]
