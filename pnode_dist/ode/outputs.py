"""The outputs of a forward pass: copies of states or observations, stored or handed to a consumer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pnode_dist.ode.observing import Observing
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.step_costs import StepCosts
from pnode_dist.ode.steppers.current_state import CurrentState


@dataclass
class Outputs:
    """The outputs of one forward pass.

    `count` is their number, None if it is not known beforehand. `consumer` takes them, as tensors of its own, in place
    of a store.
    """

    layout: StateLayout
    current: CurrentState
    observing: Observing | None
    costs: StepCosts | None
    count: int | None
    consumer: Callable[[float, Parts], None] | None = None
    _stored: list[torch.Tensor] = field(default_factory=list, init=False)
    _listed: list[Parts] = field(default_factory=list, init=False)

    def add(self, step: int, time: float) -> None:
        """Add the current state, which is the one before `step`. Collective if an observation is."""
        values, observing = self.current.parts, self.observing
        if observing is not None:
            values = observing.value(step, time, values)
        if self.costs is not None:
            values = (*values, *self.costs.totals)
        if self.consumer is not None:
            self.consumer(time, tuple(self._own(value) for value in values))
        elif self.count is None:
            self._listed.append(tuple(self._own(value) for value in values))
        else:
            self._store(values, time)

    def result(self) -> Parts:
        """Return the outputs, `[n, *shape]` each."""
        if self.count is None:
            return tuple(map(torch.stack, zip(*self._listed, strict=True)))
        return tuple(self._stored)

    def _store(self, values: Parts, time: float) -> None:
        assert self.count is not None
        if not self._stored:
            dtypes = [value.dtype for value in values]
            if self.observing is None:
                dtypes = [self.layout.dtype] * len(values)
            self._stored = [
                torch.empty((self.count, *value.shape), dtype=dtype, device=self._device(value))
                for value, dtype in zip(values, dtypes, strict=True)
            ]
            self._number = 0
        for store, value in zip(self._stored, values, strict=True):
            if store.shape[1:] != value.shape:
                raise ValueError(
                    f"observe returned shape {tuple(value.shape)} at t = {time:.6g}, and {tuple(store.shape[1:])} "
                    "before: must be the same at all times"
                )
            store[self._number].copy_(value)
        self._number += 1

    def _own(self, value: torch.Tensor) -> torch.Tensor:
        dtype = self.layout.dtype if self.observing is None else value.dtype
        return value.to(self._device(value), dtype, copy=True)

    def _device(self, value: torch.Tensor) -> torch.device:
        return self.layout.device if self.observing is None else value.device
