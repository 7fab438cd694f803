"""An event of a solve, and the solution of a solve with events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.layout import State
from pnode_dist.ode.rhs.observed import Observations

REDUCTIONS = ("sum", "min", "max", "same")


@dataclass(frozen=True, eq=False)
class Event:
    """A zero of `g(t, u, *args)` along a solve, and what happens there.

    - `g`: returns one number as a 0-dimensional tensor, from this rank's part of the state. It must be continuous.
    - `direction`: the event is a zero where g increases (1), decreases (-1), or either (0), in the order in which the
      solve passes the times, also if these decrease.
    - `terminal`: the solve ends at this event; a number ends it at the event of that number.
    - `reset`: returns the state after the event from the state before it, `reset(t, u, *args)`, in the same shape.
    - `name`: the name in messages, by default that of g.
    - `over`: the reduction of g over the ranks that share the state. All ranks use the reduced number: the `sum`, the
      `min` or the `max`. `same` is for a g that is already equal on all ranks, which is checked.

    Raises `ConfigurationError` for a wrong field.
    """

    g: Callable[..., Any]
    direction: int = 0
    terminal: bool | int = False
    reset: Callable[..., Any] | None = None
    name: str = ""
    over: str = "sum"

    def __post_init__(self) -> None:
        if not callable(self.g):
            raise ConfigurationError(f"g = {self.g!r}: must be a function of t, u and args")
        if not self.name:
            object.__setattr__(self, "name", str(getattr(self.g, "__name__", type(self.g).__name__)))
        where = f"event {self.name!r}"
        if isinstance(self.direction, bool) or self.direction not in (-1, 0, 1):
            raise ConfigurationError(f"{where}: direction = {self.direction!r}: must be -1, 0 or 1")
        if not isinstance(self.terminal, int) or self.terminal < 0:
            raise ConfigurationError(
                f"{where}: terminal = {self.terminal!r}: must be True, False, or a positive number"
            )
        if self.reset is not None and not callable(self.reset):
            raise ConfigurationError(f"{where}: reset = {self.reset!r}: must be a function of t, u and args, or None")
        if self.over not in REDUCTIONS:
            raise ConfigurationError(f"{where}: over = {self.over!r}: must be one of {', '.join(REDUCTIONS)}")

    @property
    def facts(self) -> tuple[str, int, int, bool, str]:
        """The fields that must be equal on all ranks."""
        return self.name, self.direction, int(self.terminal), self.reset is not None, self.over


@dataclass(frozen=True, eq=False)
class EventSolution:
    """The solution of a solve with events. States are tensors, or tuples of tensors if u0 is a tuple.

    - `t`, `u`: the k output times that the solve has reached, `[k]`, and the states there, `[k, *u0.shape]`. At the
      time of an event it is the state before the reset. With `last_only` `u` is `u_end`. With `observe` u holds the
      observations of these states.
    - `event_times`: the times of the m events in the order of the solve, `[m]`, doubles.
    - `which`: for each, the index of its `Event` in the list.
    - `u_before`, `u_after`: the states before and after the reset, `[m, *u0.shape]`.
    - `t_end`, `u_end`: the end of the solve, which is the last time or a terminal event, and the state there after its
      reset.

    All but `which` are differentiable.
    """

    t: torch.Tensor
    u: State | Observations
    event_times: torch.Tensor
    which: tuple[int, ...]
    u_before: State
    u_after: State
    t_end: torch.Tensor
    u_end: State
