"""The trajectory of a solve as one of the tensors that torch's graph saves: a ticket.

The trajectory lives as long as the ticket's memory, usually as long as the graph. Hooks on saved tensors may drop the
ticket and recompute it later, like `torch.utils.checkpoint`. Then the trajectory is freed after the forward pass, and
the ticket of the backward pass belongs to the trajectory of the recomputation.
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

from pnode_dist.system.torch_internals import is_checkpointing


class _Ticket(ctypes.c_int64):
    """A random number in memory of its own, which a tensor shares."""

    held: Any
    abandon: Callable[[], None]

    def __del__(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        if not at_exit():
            self.abandon()


_tickets: weakref.WeakValueDictionary[int, _Ticket] = weakref.WeakValueDictionary()


def ticket_of(held: Any, abandon: Callable[[], None]) -> torch.Tensor:
    """Return a tensor to be saved for `held`. When its memory is freed, `abandon` is called."""
    # 62 random bits: a hook that changes the number does not produce that of another trajectory.
    ticket = _Ticket(secrets.randbits(62))
    ticket.held, ticket.abandon = held, abandon
    _tickets[ticket.value] = ticket
    return torch.frombuffer(ticket, dtype=torch.int64)


def held_by(ticket: torch.Tensor) -> Any:
    """Return the object of a saved ticket; None if it was freed."""
    found = _tickets.get(int(ticket.item()))
    return None if found is None else found.held


@contextmanager
def hidden_from_checkpoint() -> Iterator[bool]:
    """Hide tensors saved within the context from `torch.utils.checkpoint`: tapes are not part of the outer graph.

    Yields True if `torch.utils.checkpoint` is active. Other hooks on saved tensors, such as those that move them to the
    host, still apply.
    """
    if is_checkpointing():
        with saved_tensors_hooks(_same, _same):
            yield True
    else:
        yield False


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
