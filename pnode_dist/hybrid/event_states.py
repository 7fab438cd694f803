"""States as the caller has them, a tensor or a tuple of tensors, stacked along a first axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pnode_dist.ode.rhs.layout import Parts, State


def parts_of(u: State) -> Parts:
    """Return the parts of a state."""
    return (u,) if isinstance(u, torch.Tensor) else tuple(u)


def mapped(function: Callable[[torch.Tensor], torch.Tensor], u: State) -> State:
    """Return the state whose parts are those of `u` through `function`."""
    return function(u) if isinstance(u, torch.Tensor) else tuple(map(function, u))


def row(states: State, number: int) -> State:
    """Return one of the states, `[n, *shape]`."""
    return mapped(lambda part: part[number], states)


def rows(states: State, numbers: Sequence[int]) -> State:
    """Return some of the states, `[n, *shape]`."""
    return mapped(lambda part: part[list(numbers)], states)


def detached(u: State) -> State:
    """Return the state without its graph."""
    return mapped(torch.Tensor.detach, u)


def lifted(u: State) -> State:
    """Return the state as the only one of a stack, `[1, *shape]`."""
    return mapped(lambda part: part[None], u)


def joined(stacks: Sequence[State], form: State) -> State:
    """Return stacks `[n, *shape]` one after the other. `form` is a state, whose form an empty stack has."""
    stacks = [mapped(lambda part: part.new_empty((0, *part.shape)), detached(form)), *stacks]
    found = tuple(torch.cat(parts) for parts in zip(*map(parts_of, stacks), strict=True))
    return found[0] if isinstance(form, torch.Tensor) else found
