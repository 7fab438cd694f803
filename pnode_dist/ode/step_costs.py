"""The running cost of a solve by a theta method: the integral of r(t, u), added up step by step.

The quadrature of a step has the stages of the method: its ends, or one point between them. So it follows from the
states at both ends, and takes no part in the equations of the step. (PETSc's TSTHETA has the same cost integral.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.recomputation.carried import Mark
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.products import added


class StepEnds(NamedTuple):
    """A step from `time` by `size`, and the states at its ends, in the type of the solve."""

    time: float
    size: float
    before: Parts
    after: Parts


class Pulled(NamedTuple):
    """The gradient of the cost of a step: with respect to the states at its ends, and its start. None is zero.

    `by_size` is that with respect to its size, times the size.
    """

    before: Sequence[torch.Tensor | None]
    after: Sequence[torch.Tensor | None]
    by_size: float
    by_start: float


@dataclass
class StepCosts:
    """The running cost of one solve.

    `theta` and `endpoint` are those of the method, see `theta_tableau`. `totals` are the integrals up to the present
    state, and `ends[n]` the ends of step n until it is pulled back. `cotangents` are those of the integrals at all
    outputs after the present step of the backward pass, and `gradient` is that with respect to the parameters.
    """

    cost: Callable[..., Parts]
    bound: BoundFunction
    layout: StateLayout
    ranks: int
    theta: float
    endpoint: bool
    totals: Parts = ()
    ends: dict[int, tuple[StepEnds, Mark | None]] = field(default_factory=dict)
    fingerprints: dict[int, float] = field(default_factory=dict)
    cotangents: list[torch.Tensor] = field(default_factory=list)
    gradient: list[torch.Tensor | None] = field(default_factory=list)

    def start(self, time: float, state: Parts) -> None:
        """Begin a forward pass with integrals of zero. Evaluates the cost, for its shape."""
        with self.bound.carried.aside(), torch.no_grad():
            values = self.cost(self._when(time), self._inputs(state), *self.bound.args)
        if any(value.is_complex() for value in values):
            raise TypeError("integrate returned complex numbers: must return real ones, see torch.view_as_real")
        self.ends.clear()
        self.fingerprints.clear()
        layout = self.layout
        self.totals = tuple(torch.zeros(value.shape, dtype=layout.dtype, device=layout.device) for value in values)

    def add(self, step: int, ends: StepEnds) -> None:
        """Add the cost of a step to the totals. Collective if the cost is.

        Raises `ConfigurationError` for a cost that writes to the state.
        """
        bound, inputs = self.bound, (self._inputs(ends.before), self._inputs(ends.after))
        versions = [part._version for parts in inputs for part in parts]
        with bound.carried.aside(), torch.set_grad_enabled(bound.watched):
            values = self._of_step(self._when(ends.time), self._when(ends.size), *inputs)
        if versions != [part._version for parts in inputs for part in parts]:
            raise ConfigurationError("integrate: it writes to the state: must return new tensors")
        if bound.watched:
            bound.check(values, (), "integrate")
        if bound.guard is not None:
            self.fingerprints[step] = fingerprint([value.detach() for value in values])
        self.totals = tuple(total + value.detach() for total, value in zip(self.totals, values, strict=True))

    def keep(self, step: int, ends: StepEnds) -> None:
        """Keep the ends of a step until its cost is pulled back. The states must not be written to."""
        self.ends[step] = ends, self.bound.carried.mark()

    def start_adjoint(self) -> None:
        """Begin a backward pass."""
        self.cotangents = [torch.zeros_like(total) for total in self.totals]
        self.gradient = [None] * len(self.bound.parameters.tensors)

    def receive(self, cotangents: Sequence[torch.Tensor | None]) -> None:
        """Add the cotangents of the integrals at an output, which the backward pass has reached."""
        pairs = zip(self.cotangents, cotangents, strict=True)
        self.cotangents = [old if new is None else old + new for old, new in pairs]

    def pull_back(self, step: int) -> Pulled | None:
        """Pull the cotangents back to the ends of a step. Collective if the cost is.

        Raises `RecomputationError` for a cost with another value than before, see `Guard`.
        """
        (time, size, before, after), mark = self.ends.pop(step)
        if self.ranks == 1 and not any(bool(cotangent.any()) for cotangent in self.cotangents):
            return None
        bound = self.bound
        starts = tuple(part.requires_grad_() for part in self._inputs(before))
        results = tuple(part.requires_grad_() for part in self._inputs(after))
        start, length = (self._when(number).requires_grad_(bound.needs_time_gradient) for number in (time, size))
        with bound.carried.aside(), torch.enable_grad():
            bound.carried.restore(mark)
            values = self._of_step(start, length, starts, results)
        leaves = (*starts, *results, *((start, length) if bound.needs_time_gradient else ()))
        bound.check(values, leaves, "integrate")
        if bound.guard is not None and step in self.fingerprints:
            found = tuple(value.detach() for value in values)
            bound.guard.compare_value(self.fingerprints[step], time, found, "integrate")
        pairs = [pair for pair in zip(values, self.cotangents, strict=True) if pair[0].requires_grad]
        if not pairs:
            return None
        outputs, cotangents = zip(*pairs, strict=True)
        parameters = bound.parameters
        products = torch.autograd.grad(
            outputs,
            (*leaves, *parameters.tensors),
            cotangents,
            allow_unused=True,
            retain_graph=parameters.shares_graph,
        )
        self.gradient = added(self.gradient, products[len(leaves) :], self.layout.state_dtype)
        count = len(starts)
        by_start = by_size = 0.0
        if bound.needs_time_gradient:
            by_start, by_size = (0.0 if one is None else one.item() for one in products[2 * count : len(leaves)])
        return Pulled(products[:count], products[count : 2 * count], by_size * size, by_start)

    def _of_step(self, time: torch.Tensor, size: torch.Tensor, before: Parts, after: Parts) -> Parts:
        """Return the cost of a step, from its ends."""
        if self.theta == 1.0:
            return tuple(size * value for value in self._rate(time + size, after))
        if not self.endpoint:
            middle = tuple(start + self.theta * (end - start) for start, end in zip(before, after, strict=True))
            return tuple(size * value for value in self._rate(time + self.theta * size, middle))
        first, last = self._rate(time, before), self._rate(time + size, after)
        return tuple(size * ((1 - self.theta) * a + self.theta * b) for a, b in zip(first, last, strict=True))

    def _rate(self, time: torch.Tensor, state: Parts) -> Parts:
        interval = self.bound.smooth_interval
        when = time if interval is None else interval.inside(time)
        values = self.cost(when, state, *self.bound.args)
        shapes = [tuple(value.shape) for value in values]
        if shapes != [tuple(total.shape) for total in self.totals]:
            raise ValueError(
                f"integrate returned shapes {shapes} at t = {float(when):.6g}, and "
                f"{[tuple(total.shape) for total in self.totals]} before: must be the same at all times"
            )
        return tuple(value.to(self.layout.dtype) for value in values)

    def _inputs(self, state: Parts) -> Parts:
        return tuple(part.detach().to(self.layout.device, self.layout.dtype) for part in state)

    def _when(self, time: float) -> torch.Tensor:
        return torch.tensor(time, dtype=self.layout.dtype, device=self.layout.device)
