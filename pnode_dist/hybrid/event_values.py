"""The values of events on all ranks: every rank decides by the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.errors import ConfigurationError, DisagreementError, EventError
from pnode_dist.exchange.sums import global_sum
from pnode_dist.hybrid.event import Event
from pnode_dist.hybrid.event_states import parts_of
from pnode_dist.ode.rhs.layout import State


def clock(t: torch.Tensor | float, u: State) -> torch.Tensor:
    """Return the time as func gets it: a 0-dimensional tensor in the type and on the device of the state."""
    part = parts_of(u)[0]
    return torch.as_tensor(t, dtype=torch.float64).to(part.device, part.dtype)


def on_all_ranks(comm: MPI.Comm, compute: Callable[[], Any]) -> Any:
    """Return `compute()`. Collective: an error on one rank is raised there, and reported on all others."""
    if comm.size == 1:
        return compute()
    try:
        value, error = compute(), None
    except Exception as raised:
        value, error = None, raised
    if comm.allreduce(error is not None, MPI.LOR):
        told = comm.allgather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        rank = next(rank for rank, text in enumerate(told) if text is not None)
        raise EventError(f"rank {rank} of {comm.size}: {told[rank]}")
    return value


def own_value(event: Event, t: torch.Tensor, u: State, args: tuple[Any, ...]) -> torch.Tensor:
    """Return this rank's g as a 0-dimensional tensor. Raises `ConfigurationError` if it is not one real number."""
    value = event.g(t, u, *args)
    if not isinstance(value, torch.Tensor):
        value = torch.as_tensor(value)
    if value.numel() != 1 or value.is_complex():
        kind = "a complex number" if value.is_complex() else f"shape {list(value.shape)}"
        raise ConfigurationError(
            f"event {event.name!r}: g must return one real number, got {kind}: reduce it, such as by min() or sum()"
        )
    return value.reshape(())


def values_at(
    events: Sequence[Event], comm: MPI.Comm, t: float, u: State, args: tuple[Any, ...]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return the reduced value of each event at `t`, and the rank that `min` or `max` took it from. Collective.

    Raises `EventError` for a value that is not a number, and `DisagreementError` if one `over` "same" differs.
    """

    def own() -> list[float]:
        when = clock(t, u)
        with torch.no_grad():
            return [own_value(event, when, u, args).item() for event in events]

    mine = np.array(on_all_ranks(comm, own), dtype=np.float64)
    everyone = np.empty((comm.size, len(events)))
    if comm.size > 1:
        comm.Allgather(mine, everyone)
    else:
        everyone[0] = mine
    found = [_reduced(event, everyone[:, number], t) for number, event in enumerate(events)]
    return tuple(value for value, _ in found), tuple(owner for _, owner in found)


def _reduced(event: Event, values: np.ndarray[Any, np.dtype[np.float64]], t: float) -> tuple[float, int]:
    if np.isnan(values).any():
        rank = int(np.flatnonzero(np.isnan(values))[0])
        raise EventError(f"event {event.name!r}: g is nan at t = {t:.12g} on rank {rank} of {len(values)}")
    if event.over == "same" and not (values == values[0]).all():
        raise DisagreementError(
            f"event {event.name!r}: over = 'same', but g differs between the ranks at t = {t:.12g}: "
            f"{', '.join(f'{value:.17g}' for value in values)}"
        )
    if event.over == "sum":
        return math.fsum(values), 0
    owner = int(values.argmin() if event.over == "min" else values.argmax())
    return float(values[owner]), owner


def differentiable_value(
    event: Event, comm: MPI.Comm, t: torch.Tensor, u: State, args: tuple[Any, ...], owner: int
) -> torch.Tensor:
    """Return the reduced value of an event with its graph, which is the same on all ranks. Collective.

    `owner` is the rank that `min` or `max` takes the value from.
    """
    own = on_all_ranks(comm, lambda: own_value(event, clock(t, u), u, args))
    anchor = torch.zeros((), requires_grad=True)
    joint: torch.Tensor = _WithGraph.apply(own.to(torch.float64).cpu(), anchor, *parts_of(u))  # type: ignore[no-untyped-call]
    if comm.size == 1 or event.over == "same":
        return joint
    if event.over != "sum" and comm.rank != owner:
        joint = joint * 0.0
    return global_sum(joint, comm)


class _WithGraph(torch.autograd.Function):
    """A value, with a graph that leads to the state even where the value does not depend on it.

    Otherwise only some ranks would take part in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Return the value."""
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        """Return the cotangent of the value, and zeros for the others."""
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others)
        return *cotangents, *zeros


class OnAllRanks(torch.autograd.Function):
    """Tensors that are differentiated together, so that every rank reverses the same solves whatever its loss is."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> Any:
        """Return the tensors."""
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        """Return the cotangents; zero where there is none."""
        return cotangents
