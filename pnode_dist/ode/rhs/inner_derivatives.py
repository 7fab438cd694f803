"""Right-hand sides that differentiate inside: Hamiltonian and Lagrangian networks take the gradient of an energy.

Such an f needs a graph of its state even if the solve needs no gradient: in steps of a forward pass that keep no graph,
and under torch.no_grad. It is detected by the error that torch raises without a graph. From then on it is evaluated
with a graph, which is freed after the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pnode_dist.ode.recomputation.carried import generators

Parts = tuple[torch.Tensor, ...]
_MESSAGES = (
    "does not require grad and does not have a grad_fn",
    "One of the differentiated Tensors does not require grad",
)
_found: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def differentiates(func: Any) -> bool | None:
    """Return True if an earlier evaluation of `func` needed a graph of its state; None without an earlier one."""
    try:
        return _found.get(func)
    except TypeError:  # It cannot be hashed, or not be referred to weakly.
        return None


def note(func: Any, differentiates: bool) -> bool:
    """Store the finding of an evaluation for later solves, and return it."""
    with suppress(TypeError):
        _found[func] = differentiates
    return differentiates


def lacks_graph(error: RuntimeError) -> bool:
    """Return True for torch's error for a derivative of a tensor without a graph."""
    return any(message in str(error) for message in _MESSAGES)


def random_states(device: torch.device) -> Callable[[], None]:
    """Return a function that restores the present random states: a repeated evaluation draws the same."""
    before = [(put, get()) for get, put in generators(device)]

    def restore() -> None:
        for put, state in before:
            put(state)

    return restore


def leaves_of(inputs: Parts) -> Parts:
    """Return the same values as leaves of a graph. Call it outside inference mode."""
    return tuple((part.clone() if part.is_inference() else part.detach()).requires_grad_() for part in inputs)


def unmark(parts: Iterable[torch.Tensor]) -> None:
    """Undo a `requires_grad_` that f applied to its state."""
    for part in parts:
        if part.requires_grad:
            part.requires_grad_(False)
