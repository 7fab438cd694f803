"""Scatter and gather of a global tensor between one rank and all ranks, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from pnode_dist.partition import protocol
from pnode_dist.partition.protocol import Partition


def scatter(x: torch.Tensor | None, partition: Partition, root: int = 0) -> torch.Tensor:
    """Distribute a global tensor from `root`. Collective on the partition's communicator.

    `x` is `[..., *global_shape]` on `root`; its values are ignored elsewhere. The adjoint gathers the cotangents on
    `root`. Under torch.func the other ranks must pass a tensor under the same transforms, which may be empty.
    """
    local: torch.Tensor = _Scatter.apply(_source(x, partition, root), partition, root)  # type: ignore[no-untyped-call]
    return local


def _source(x: torch.Tensor | None, partition: Partition, root: int) -> torch.Tensor:
    """Return `x` on `root`, and elsewhere an empty tensor that requires a gradient if `x` does on `root`.

    The other ranks need a node in their graph, so that they take part in derivatives.
    """
    at_root = partition.comm.rank == root
    traits = (x.dtype, x.requires_grad, _has_tangent(x)) if at_root and x is not None else None
    traits = partition.comm.bcast(traits, root=root)
    if traits is None:
        raise ValueError(f"scatter: rank {root}, the root, gave no tensor")
    if at_root and x is not None:
        return x
    dtype, differentiable, dual = traits
    if not (differentiable or dual):
        return torch.empty(0, dtype=dtype)
    source = torch.empty(0) if x is None else x.reshape(-1)[:0].to(dtype)
    if differentiable and not source.requires_grad:
        source = torch.empty(0, dtype=dtype, requires_grad=True)
    if dual and not _has_tangent(source):
        source = forward_ad.make_dual(source, torch.empty(0, dtype=dtype))  # type: ignore[no-untyped-call]
    return source


def _has_tangent(x: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, partition: Partition, root: int) -> torch.Tensor:
        return protocol.scatter(x, partition, root)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.partition, ctx.root = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return gather(cotangents[0], ctx.partition, ctx.root), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return scatter(tangents[0], ctx.partition, ctx.root)


def gather(x: torch.Tensor, partition: Partition, root: int = 0) -> torch.Tensor:
    """Return the global tensor `[..., *global_shape]` on `root`, an empty tensor elsewhere. Collective.

    The adjoint scatters root's cotangent. The other ranks take part if their share of the loss contains the empty
    tensor, for instance as its sum, which is zero.
    """
    whole: torch.Tensor = _Gather.apply(x, partition, root)  # type: ignore[no-untyped-call]
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, partition: Partition, root: int) -> torch.Tensor:
        whole = protocol.gather(x, partition, root)
        return x.new_empty(0) if whole is None else whole

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.partition, ctx.root = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return scatter(cotangents[0], ctx.partition, ctx.root), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return gather(tangents[0], ctx.partition, ctx.root)
