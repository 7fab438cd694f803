"""The map between the steps of one solve: applied after each step, and pulled back before its adjoint.

The tape of the map follows that of the step: its graph at the level "graph", else its argument, from which the backward
pass evaluates it again. Where the graph of a step goes on into the next one (`GraphTape`), and in segments of compiled
steps, the map is a part of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.rhs.evaluation import BoundFunction, MapTape
from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.rhs.ownership import owned
from pnode_dist.ode.rhs.products import added, pull_back
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.base import Stepper
from pnode_dist.ode.steppers.graph_tape import GraphTape
from pnode_dist.ode.steppers.tape import Tape


@dataclass
class BetweenSteps:
    """The map of a solve, on the states of `stepper`s. All functions are collective if the map is.

    `unmapped` is the state to which the map was applied last; kept only if `keeps_unmapped`. `gradient` is that of a
    backward pass with respect to the parameters, through the map alone, where it has a tape of its own. `by_time[n]` is
    that with respect to the time of the state before step n.
    """

    bound: BoundFunction
    keeps_unmapped: bool = False
    unmapped: Parts = ()
    gradient: list[torch.Tensor | None] = field(default_factory=list)
    by_time: dict[int, float] = field(default_factory=dict)

    def start_adjoint(self) -> None:
        """Begin a backward pass."""
        self.gradient, self.by_time = [None] * len(self.bound.parameters.tensors), {}

    def advance(self, stepper: Stepper, segment: Segment) -> None:
        """Apply the map to the state after a segment of one step."""
        inputs = self._inputs(stepper)
        with torch.no_grad():
            values = self.bound.between_value(stepper.layout, segment.end, inputs)
        self._replace(stepper, values)

    def record(self, stepper: Stepper, segment: Segment, level: str) -> MapTape:
        """Apply the map to the state after a segment of one step, and return its tape."""
        bound, layout, time, inputs = self.bound, stepper.layout, segment.end, self._inputs(stepper)
        if level == "graph":
            values, made = bound.between_graph(layout, time, inputs)
            self._replace(stepper, values)
            return made
        mark = bound.carried.mark()
        with torch.no_grad():
            values = bound.between_value(layout, time, inputs)
        compared = fingerprint(values) if bound.guard is not None else None
        self._replace(stepper, values)
        return MapTape(time, inputs, None, None, mark, compared)

    def pull_back(self, stepper: Stepper, segment: Segment, tape: Tape) -> None:
        """Take adjoint and gradient back over the map after a segment, and remove it from the tape.

        Raises `RecomputationError` for a map with another value than before, see `Guard`.
        """
        if not isinstance(tape[-1], MapTape):
            return
        recorded = tape.pop()
        assert isinstance(recorded, MapTape)
        bound, layout = self.bound, stepper.layout
        if recorded.roots is None:
            bound.carried.restore(recorded.mark)
            values, made = bound.between_graph(layout, recorded.time, recorded.inputs)
            if bound.guard is not None:
                bound.guard.compare_value(recorded.fingerprint, recorded.time, values, "between_steps")
            recorded = made

        def change(adjoint: Sequence[torch.Tensor]) -> Parts:
            return self._pulled(recorded, adjoint, segment.first + len(segment))

        stepper.change_adjoint(change)

    def _pulled(self, tape: MapTape, adjoint: Sequence[torch.Tensor], step: int) -> Parts:
        assert tape.roots is not None
        bound, when = self.bound, () if tape.when is None else (tape.when,)
        pairs = [
            (root, part.to(like))
            for root, part, like in zip(tape.roots, adjoint, tape.inputs, strict=True)
            if root is not None
        ]
        if not pairs:
            return tuple(torch.zeros_like(part) for part in adjoint)
        roots, along = zip(*pairs, strict=True)
        found = pull_back(bound, roots, (*tape.inputs, *bound.parameters.tensors, *when), along)
        count = len(tape.inputs)
        dtype = adjoint[0].dtype
        self.gradient = added(self.gradient, found[count : count + len(self.gradient)], dtype)
        if when and (by_time := found[-1]) is not None:
            self.by_time[step] = by_time.item()
        return tuple(
            torch.zeros_like(old) if new is None else new.to(old)
            for new, old in zip(found[:count], adjoint, strict=True)
        )

    def _inputs(self, stepper: Stepper) -> Parts:
        """Return the state as the map takes it: in the type of the caller's, which later steps leave as it is."""
        layout, state = stepper.layout, stepper.current.kept()
        if self.keeps_unmapped:
            self.unmapped = state
        return tuple(part.detach().to(layout.device, layout.dtype) for part in state)

    def _replace(self, stepper: Stepper, values: Parts) -> None:
        with torch.no_grad():
            stepper.current.set(owned(values))
        if stepper.fingerprints:
            stepper.fingerprint = fingerprint(stepper.current.parts)


def take(stepper: Stepper, segment: Segment, between: BetweenSteps | None) -> None:
    """Advance over a segment, and apply the map after it, if there is one. Collective."""
    stepper.advance(segment)
    if between is not None and not stepper.maps(segment):
        between.advance(stepper, segment)


def take_with_tape(stepper: Stepper, segment: Segment, level: str, between: BetweenSteps | None) -> Tape:
    """Advance over a segment, and apply the map after it, if there is one. Returns the tape. Collective.

    Raises `ConfigurationError` if the graphs of several steps can no longer be one, although those before could.
    """
    tape = stepper.record(segment, level)
    if between is None or stepper.maps(segment) or isinstance(tape[0], GraphTape):
        return tape
    if len(segment) > 1:
        raise ConfigurationError(
            f"between_steps: at t = {segment.starts[0]:.6g} func begins to differentiate with respect to its "
            "parameters, so several steps with the map between them have no common graph: use keep = 'stages'"
        )
    tape.append(between.record(stepper, segment, level))
    return tape


def reverse(stepper: Stepper, segment: Segment, tape: Tape, between: BetweenSteps | None) -> list[tuple[float, float]]:
    """Take adjoint and gradient back over a segment and the map after it. Collective, see `Stepper.pull_back`."""
    if between is not None:
        between.pull_back(stepper, segment, tape)
    return stepper.pull_back(segment, tape)
