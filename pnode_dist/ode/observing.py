"""The observations of one solve: evaluated at its outputs, and pulled back in its backward pass.

The backward pass evaluates an observation again, with its graph, at the state after a recorded step. That state is
there: it was kept with the step's tape, or has just been recomputed. So the memory is that of the observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.recomputation.carried import Mark
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.observed import OfParts
from pnode_dist.ode.rhs.products import added


class _Observed(NamedTuple):
    """An observed state: its time, the state in the solve's type, and the state that f carried then."""

    time: float
    state: Parts
    mark: Mark | None


@dataclass
class Observing:
    """The observation of a solve, with the states at which the backward pass evaluates it.

    `states[n]` is the state before step n, for steps whose observation has not been pulled back. `cotangents` are those
    of the outputs in a backward pass, and `gradient` is the gradient with respect to the parameters, through the
    observations alone. `by_time[n]` is that with respect to the time of the state before step n.
    """

    observe: OfParts
    bound: BoundFunction
    layout: StateLayout
    ranks: int
    states: dict[int, _Observed] = field(default_factory=dict)
    fingerprints: dict[int, float] = field(default_factory=dict)
    cotangents: Sequence[torch.Tensor | None] = ()
    gradient: list[torch.Tensor | None] = field(default_factory=list)
    by_time: dict[int, float] = field(default_factory=dict)

    def value(self, step: int, time: float, state: Parts) -> Parts:
        """Observe the state before `step`. Collective if the observation is.

        Raises `ConfigurationError` for an observation that writes to the state.
        """
        bound, layout = self.bound, self.layout
        parts = tuple(part.detach().to(layout.device, layout.dtype) for part in state)
        versions = [part._version for part in parts]
        with bound.carried.aside(), torch.set_grad_enabled(bound.watched):
            values = self.observe(self._when(time), parts, *bound.args)
        if versions != [part._version for part in parts]:
            raise ConfigurationError("observe: it writes to the state: must return new tensors")
        if bound.watched:
            bound.check(values, parts, "observe")
        if bound.guard is not None:
            self.fingerprints[step] = _fingerprint(values)
        return tuple(value.detach() for value in values)

    def keep(self, step: int, time: float, state: Parts) -> None:
        """Keep the state before `step` until its observation is pulled back. It must not be written to."""
        self.states[step] = _Observed(time, state, self.bound.carried.mark())

    def start_adjoint(self, cotangents: Sequence[torch.Tensor | None]) -> None:
        """Begin a backward pass with the cotangents of the outputs."""
        self.cotangents = cotangents
        self.gradient, self.by_time = [None] * len(self.bound.parameters.tensors), {}

    def pull_back(self, step: int, number: int | None, only: bool) -> Sequence[torch.Tensor | None] | None:
        """Pull the cotangents of output `number`, if it is one, back to the state before `step`. None is zero.

        `only`: the outputs have no axis of times. Collective if the observation is. Raises `RecomputationError` for an
        observation with another value than before, see `Guard`.
        """
        found = self.states.pop(step, None)
        if number is None or (self.ranks == 1 and all(one is None for one in self.cotangents)):
            return None
        assert found is not None
        time, state, mark = found
        layout, bound = self.layout, self.bound
        leaves = tuple(part.detach().to(layout.device, layout.dtype).requires_grad_() for part in state)
        when = self._when(time).requires_grad_(bound.needs_time_gradient)
        with bound.carried.aside(), torch.enable_grad():
            bound.carried.restore(mark)
            values = self.observe(when, leaves, *bound.args)
        bound.check(values, (*leaves, when) if when.requires_grad else leaves, "observe")
        if bound.guard is not None and step in self.fingerprints:
            bound.guard.compare_value(self.fingerprints[step], time, _real(values), "observe")
        wanted = (*leaves, *bound.parameters.tensors, *((when,) if when.requires_grad else ()))
        pairs = [
            (value, torch.zeros_like(value) if given is None else given if only else given[number])
            for value, given in zip(values, self.cotangents, strict=True)
            if value.requires_grad and (given is not None or self.ranks > 1)
        ]
        if not pairs:
            return None
        outputs, cotangents = zip(*pairs, strict=True)
        products = torch.autograd.grad(
            outputs, wanted, cotangents, allow_unused=True, retain_graph=bound.parameters.shares_graph
        )
        count = len(leaves)
        own = products[count : count + len(self.gradient)]
        self.gradient = added(self.gradient, own, self.layout.state_dtype)
        if when.requires_grad and products[-1] is not None:
            self.by_time[step] = products[-1].item()
        return products[:count]

    def _when(self, time: float) -> torch.Tensor:
        return torch.tensor(time, dtype=self.layout.dtype, device=self.layout.device)


def _real(values: Parts) -> Parts:
    return tuple(torch.view_as_real(value.detach()) if value.is_complex() else value.detach() for value in values)


def _fingerprint(values: Parts) -> float:
    return fingerprint(_real(values)) if values else 0.0


def with_further(gradient: Sequence[torch.Tensor], further: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor]:
    """Add the gradient through observations or costs to that through the steps."""
    pairs = zip(gradient, further, strict=True)
    return [old if more is None else old + more.to(old.device) for old, more in pairs]
