"""Segments of compiled steps of many small implicit systems: the calls of compiled code until Newton has converged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from mpi4py import MPI

from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.batched_newton import NewtonTolerances, largest
from pnode_dist.ode.steppers.compiled_segment import CompiledSegments, CompiledTape, Turns
from pnode_dist.ode.steppers.traced_implicit import UPDATES, ImplicitStep

_Tape = TypeVar("_Tape")


@dataclass(frozen=True)
class BatchedSegments:
    """The compiled segments of `step`, for the states `[sample, component]` of the ranks of `comm`."""

    compiled: CompiledSegments
    step: ImplicitStep
    tolerances: NewtonTolerances
    comm: MPI.Comm

    def advance(self, bound: BoundFunction, segment: Segment, state: torch.Tensor) -> torch.Tensor | None:
        """Return the state after the steps; None on all ranks if Newton's method has not converged. Collective."""

        def run(turns: Turns) -> tuple[Parts, None]:
            return self.compiled.run(bound, (state,), turns), None

        found = self._converged(bound, segment, run)
        return None if found is None else found[0]

    def record(
        self, bound: BoundFunction, segment: Segment, state: torch.Tensor
    ) -> tuple[torch.Tensor, CompiledTape] | None:
        """Return the state after the steps, and their tape; None like `advance`. Collective."""

        def run(turns: Turns) -> tuple[Parts, CompiledTape]:
            return self.compiled.run_with_tape(bound, (state,), turns)

        return self._converged(bound, segment, run)

    def _converged(
        self, bound: BoundFunction, segment: Segment, run: Callable[[Turns], tuple[Parts, _Tape]]
    ) -> tuple[torch.Tensor, _Tape] | None:
        """Call `run` from the solutions of the call before, as long as residuals become smaller."""
        turns, before = self.step.turns(segment), float("inf")
        for _ in range(UPDATES, self.tolerances.iterations + UPDATES, UPDATES):
            (after, guesses, firsts, worst), tape = run(turns)
            bound.newton_iterations += UPDATES * self.step.solved_stages * len(segment)
            left = largest(float(worst.amax()), self.comm)
            if left == 0.0:
                return after, tape
            if not left < before:
                return None
            before = left
            # Times that require a gradient belong to the tape of this call.
            turns = *segment.tensors(), guesses.detach(), firsts.detach()
        return None
