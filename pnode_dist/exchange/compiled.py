"""Exchanges in code that torch.compile compiles, in the same order on all ranks.

A compiler may change the order of operations that do not depend on each other. Inductor does, by their sizes, which
differ between ranks; ranks that exchange in different orders wait for each other for ever. Each exchange therefore
takes a token, a tensor of one number, from the exchange before it, and gives one to the next. The derivative of an
exchange takes the gradient of its second result and returns that of the token, so that the backward pass has the
reverse order. The order is data, which no pass of a compiler may change. torch's own effect tokens do not order the
backward pass of torch 2.13, and keep compiled code out of the cache on disk.

The first token of a graph is an input of the graph, and the last one is written to an input. So no exchange is without
use, also where this rank's part of its result is empty and all that follows from it is eliminated.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, Sequence  # noqa: UP035

import torch

from pnode_dist.system.compile_order import is_rehearsal
from pnode_dist.system.torch_internals import (
    TRACES_OBJECTS,
    evaluated_while_tracing,
    functionalization,
    is_traced_apart,
    under_functorch,
)

OwnedMap = Callable[[torch.Tensor, Any], torch.Tensor]
"""A map of a tensor, given the object that describes the communication: a partition, a mesh or a communicator."""


@dataclass(frozen=True)
class _Registered:
    """A linear map and its transpose. The reference does not keep the owner alive."""

    owner: weakref.ref[Any]
    forward: OwnedMap
    transpose: OwnedMap


# A number is never used again. All ranks run the same program, so that a map has the same number on all of them, and
# in every run: compiled code, which contains it, is found again in the cache on disk.
_maps: dict[int, _Registered] = {}
_numbers: dict[tuple[int, Hashable], int] = {}
_next = itertools.count(1)


def number_of(owner: Any, key: Hashable, forward: OwnedMap, transpose: OwnedMap) -> int:
    """Return the number of a linear map in compiled code, registered if it is new. Not collective.

    A map is identified by its owner and `key`. It is removed with its owner.
    """
    place = (id(owner), key)
    number = _numbers.get(place)
    if number is None:
        number = _numbers[place] = next(_next)

        def remove(_: object) -> None:
            _numbers.pop(place, None)
            _maps.pop(number, None)

        _maps[number] = _Registered(weakref.ref(owner, remove), forward, transpose)
    return number


def _registered(number: int) -> tuple[_Registered, Any]:
    """Return a map and its owner."""
    found = _maps.get(number)
    owner = None if found is None else found.owner()
    if found is None or owner is None:
        raise RuntimeError(f"exchange {number} in compiled code: its partition, mesh or communicator no longer exists")
    return found, owner


# torch 2.6 takes typing.Sequence and not that of collections.abc.
@torch.library.custom_op("pnode_dist::ordered_exchange", mutates_args=())
def ordered_exchange(
    x: torch.Tensor, token: torch.Tensor, number: int, transposed: bool, shape: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the registered map of this number, or its transpose. Collective if the map is.

    Returns the result, contiguous, of `shape` and the type of `x`, and a token for the next exchange. The shape is an
    argument so that the cache on disk distinguishes maps that have one number in different programs. Raises
    `RuntimeError` if the owner of the map no longer exists, or if the map returns another shape or type.
    """
    following = torch.zeros_like(token)
    if is_rehearsal():
        return x.new_zeros(shape), following
    found, owner = _registered(number)
    image = (found.transpose if transposed else found.forward)(x.detach(), owner)
    if tuple(image.shape) != tuple(shape) or image.dtype != x.dtype:
        received, wanted = (
            f"{tuple(extents)} of {dtype}" for extents, dtype in ((image.shape, image.dtype), (shape, x.dtype))
        )
        raise RuntimeError(f"exchange {number} in compiled code: got {received}, compiled for {wanted}")
    return image.to(x.device).contiguous(), following


@ordered_exchange.register_fake
def _(
    x: torch.Tensor, token: torch.Tensor, number: int, transposed: bool, shape: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(shape), torch.empty_like(token)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _, ctx.number, ctx.transposed, _ = inputs
    ctx.shape = x.shape


def _backward(ctx: Any, cotangent: torch.Tensor, token: torch.Tensor) -> tuple[Any, ...]:
    if not ctx.needs_input_grad[0]:
        return None, token, None, None, None
    gradient, token = ordered_exchange(cotangent, token, ctx.number, not ctx.transposed, ctx.shape)
    return gradient, token, None, None, None


ordered_exchange.register_autograd(_backward, setup_context=_set_up)

# The last token of each graph that is being traced.
_tokens: weakref.WeakKeyDictionary[Any, torch.Tensor] = weakref.WeakKeyDictionary()


def _in_order(
    x: torch.Tensor, first: torch.Tensor, number: int, transposed: bool, shape: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call `ordered_exchange` with the token of the exchange before; with `first` if there is none."""
    graph = functionalization()
    token = first if graph is None else _tokens.get(graph, first)
    if first.requires_grad and not token.requires_grad:
        # Begin the backward pass's tokens.
        token = token + first
    image, token = ordered_exchange(x, token, number, transposed, shape)
    if graph is not None:
        _tokens[graph] = token
    return image, token


# AOTAutograd calls this function while it traces a graph, forward and backward, and finds `ordered_exchange` in it. The
# cache on disk is keyed by the name: rename the operation when the function changes.
_library = torch.library.Library("pnode_dist", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = "exchange_1(Tensor x, Tensor first, int number, bool transposed, int[] shape) -> (Tensor, Tensor)"
_library.define(_SCHEMA)  # type: ignore[no-untyped-call]
_library.impl("exchange_1", _in_order, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]

_first_without_gradient = torch.zeros(1)
FIRST_TOKEN = torch.zeros(1, requires_grad=True)
"""The first token of differentiable exchanges. Its gradient, 0, is an output of each compiled backward pass."""
_last = torch.zeros(1)


def exchange(x: torch.Tensor, number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the image of `x` under the map of this number, a tensor of `shape`. For code that is being compiled.

    Collective if the map is. All ranks must compile the same exchanges in the same order, of tensors with the same
    `requires_grad`.
    """
    first = FIRST_TOKEN if x.requires_grad else _first_without_gradient
    image, token = torch.ops.pnode_dist.exchange_1(x, first, number, False, shape)
    _last.copy_(token.detach())
    return image  # type: ignore[no-any-return]


def is_compiled() -> bool:
    """Return True in code that is being compiled by torch.compile.

    Return False if this torch cannot compile exchanges. They then separate compiled pieces, with one warning. Raises
    `NotImplementedError` inside a transform of `torch.func` or a checkpointed function in such code.
    """
    return torch.compiler.is_dynamo_compiling() and _can_be_compiled()


@evaluated_while_tracing
def _can_be_compiled() -> bool:
    if not TRACES_OBJECTS:
        _warn_of_old_torch()
        return False
    if under_functorch():
        raise NotImplementedError("exchange between ranks in torch.func inside torch.compile: leave one of them away")
    if is_traced_apart():
        # Exchanges that are recomputed in a backward pass would not be in order with its own.
        raise NotImplementedError(
            "exchange between ranks inside torch.compile in a function that is traced by itself, such as that of "
            "torch.utils.checkpoint, an autograd.Function, cond or while_loop: leave one of them away"
        )
    return True


@cache
def _warn_of_old_torch() -> None:
    warnings.warn(
        f"torch {torch.__version__} cannot compile exchanges between ranks, which separate compiled pieces: use 2.13",
        RuntimeWarning,
        stacklevel=2,
    )
