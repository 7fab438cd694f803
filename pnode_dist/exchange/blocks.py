"""Scatter and gather of a global tensor between one rank and all ranks, differentiable."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad

from pnode_dist.exchange.compiled import exchange, is_compiled, number_of
from pnode_dist.partition import protocol
from pnode_dist.partition.protocol import Partition
from pnode_dist.system.compile_order import refuse_in_rehearsal
from pnode_dist.system.torch_internals import evaluated_while_tracing


def scatter(x: torch.Tensor | None, partition: Partition, root: int = 0) -> torch.Tensor:
    """Distribute a global tensor from `root`. Collective on the partition's communicator.

    `x` is `[..., *global_shape]` on `root`; its values are ignored elsewhere. The adjoint gathers the cotangents on
    `root`. Under torch.func the other ranks must pass a tensor under the same transforms, which may be empty. In code
    that torch.compile compiles they must pass a tensor with the leading axes, number of axes, type and `requires_grad`
    of that on `root`; its other extents may be 0. Raises `ValueError` for another shape.
    """
    if is_compiled():
        number, shape = _registered_scatter(None if x is None else tuple(x.shape), partition, root)
        assert x is not None
        return exchange(x, number, shape)
    refuse_in_rehearsal()
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
    if is_compiled():
        return exchange(x, *_registered_gather(tuple(x.shape), partition, root))
    refuse_in_rehearsal()
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


# In code that torch.compile compiles


@evaluated_while_tracing
def _registered_scatter(shape: tuple[int, ...] | None, partition: Partition, root: int) -> tuple[int, tuple[int, ...]]:
    """Return the number of the map, and the shape of its result."""
    axes = len(partition.global_shape)
    at_root = partition.comm.rank == root
    if shape is None or len(shape) < axes or (at_root and shape[len(shape) - axes :] != partition.global_shape):
        wanted = ", ".join(map(str, partition.global_shape))
        raise ValueError(f"scatter: got shape {shape}: must be [..., {wanted}] on rank {root}, as many axes elsewhere")
    forward = partial(_scattered, root=root)
    transpose = partial(_gathered, root=root, elsewhere=shape)
    number = number_of(partition, ("scatter", root, shape), forward, transpose)
    return number, (*shape[: len(shape) - axes], *partition.local_shape)


@evaluated_while_tracing
def _registered_gather(shape: tuple[int, ...], partition: Partition, root: int) -> tuple[int, tuple[int, ...]]:
    """Return the number of the map, and the shape of its result."""
    axes = len(partition.local_shape)
    if shape[len(shape) - axes :] != partition.local_shape:
        raise ValueError(f"gather: got shape {shape}: its last axes must be {partition.local_shape}")
    forward = partial(_gathered, root=root, elsewhere=(0,))
    number = number_of(partition, ("gather", root), forward, partial(_scattered, root=root))
    at_root = partition.comm.rank == root
    return number, (*shape[: len(shape) - axes], *partition.global_shape) if at_root else (0,)


def _scattered(x: torch.Tensor, partition: Partition, root: int) -> torch.Tensor:
    return protocol.scatter(x, partition, root)


def _gathered(x: torch.Tensor, partition: Partition, root: int, elsewhere: tuple[int, ...]) -> torch.Tensor:
    """Return the whole tensor on `root`, and zeros of the shape `elsewhere` on the other ranks."""
    whole = protocol.gather(x, partition, root)
    return x.new_zeros(elsewhere) if whole is None else whole
