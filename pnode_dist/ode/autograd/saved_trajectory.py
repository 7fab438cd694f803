"""The trajectory of a solve as one of the tensors that torch's graph saves.

It lives as long as that tensor's memory: with the graph as a rule. Where hooks on saved tensors keep something else in
its place and recompute it later, as `torch.utils.checkpoint` does, the trajectory goes when the forward pass is over,
and the tensor that the backward pass gets leads to the trajectory of the recomputation.
"""

from __future__ import annotations

import ctypes
import secrets
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from pnode_dist.system.torch_internals import top_saved_tensor_hooks


class _Ticket(ctypes.c_int64):
    """A number in memory of its own, which a tensor shares."""

    held: Any
    abandon: Callable[[], None]

    def __del__(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        if not at_exit():
            self.abandon()


_tickets: weakref.WeakValueDictionary[int, _Ticket] = weakref.WeakValueDictionary()


def ticket_of(held: Any, abandon: Callable[[], None]) -> torch.Tensor:
    """A tensor to be saved, which leads to what is held: when its memory is freed, `abandon` is called."""
    # Drawn from so many that a hook that changes the number does not make it that of another trajectory.
    ticket = _Ticket(secrets.randbits(62))
    ticket.held, ticket.abandon = held, abandon
    _tickets[ticket.value] = ticket
    return torch.frombuffer(ticket, dtype=torch.int64)


def held_by(ticket: torch.Tensor) -> Any:
    """Return what a saved ticket leads to; None if that is gone."""
    found = _tickets.get(int(ticket.item()))
    return None if found is None else found.held


@contextmanager
def hidden_from_checkpoint() -> Iterator[bool]:
    """Keep `torch.utils.checkpoint` from what is saved meanwhile: graphs of steps are no part of the graph outside.

    Yields whether it is at work. Other hooks on saved tensors, such as those that move them to the host, see them.
    """
    hooks = None if top_saved_tensor_hooks is None else top_saved_tensor_hooks(False)
    if hooks is None or hooks[0].__module__ != "torch.utils.checkpoint":
        yield False
    else:
        with saved_tensors_hooks(_same, _same):
            yield True


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
