"""Right-hand sides that differentiate inside: Hamiltonian and Lagrangian networks take the gradient of an energy.

Such an f needs a graph of its state even where no gradient is asked of the solve: in the steps of a forward pass whose
graphs are not kept, and under torch.no_grad. It is found by the error that torch raises without one, and evaluated with
a graph from then on, which ends with the evaluation.
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
    """Whether an earlier evaluation found that `func` needs a graph of its state; None if there was none."""
    try:
        return _found.get(func)
    except TypeError:  # It cannot be hashed, or not be referred to weakly.
        return None


def note(func: Any, differentiates: bool) -> bool:
    """Keep for later solves what an evaluation found, and return it."""
    with suppress(TypeError):
        _found[func] = differentiates
    return differentiates


def lacks_graph(error: RuntimeError) -> bool:
    """Whether this is torch's error for a derivative with respect to what has no graph."""
    return any(message in str(error) for message in _MESSAGES)


def random_states(device: torch.device) -> Callable[[], None]:
    """Return a function that restores the present random states: a repeated evaluation draws the same."""
    before = [(put, get()) for get, put in generators(device)]

    def restore() -> None:
        for put, state in before:
            put(state)

    return restore


def leaves_of(inputs: Parts) -> Parts:
    """The same values as leaves of a graph. To be called outside of inference mode."""
    return tuple((part.clone() if part.is_inference() else part.detach()).requires_grad_() for part in inputs)


def unmark(parts: Iterable[torch.Tensor]) -> None:
    """Undo a `requires_grad_` that f applied to the state it was given: the state goes on without."""
    for part in parts:
        if part.requires_grad:
            part.requires_grad_(False)
