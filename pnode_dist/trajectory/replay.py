"""Executing a schedule: the forward pass up to `EndForward`, the backward pass from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from pnode_dist.trajectory.schedule import Action, Adjoint, Advance, EndForward, Record, Restore
from pnode_dist.trajectory.statistics import SolveStatistics
from pnode_dist.trajectory.store import Checkpoints, State


class Steps(Protocol):
    """The steps of one solve, run one at a time on a current state."""

    @property
    def state(self) -> State:
        """The current state of this rank, for reading."""
        ...

    def time(self, step: int) -> float:
        """The time at which `step` begins."""
        ...

    def overwrite(self, write: Callable[[State], None]) -> None:
        """Let `write` fill the current state."""
        ...

    def advance(self, step: int) -> None:
        """Run `step` on the current state."""
        ...

    def record(self, step: int, outlives_sweep: bool) -> None:
        """Run `step` and keep what its adjoint needs, also while other solves run if it `outlives_sweep`."""
        ...

    def adjoint(self, step: int) -> None:
        """Reverse a step that was recorded, and forget its recording."""
        ...


def run_forward(
    actions: Iterator[Action],
    steps: Steps,
    checkpoints: Checkpoints,
    statistics: SolveStatistics,
    reached: Callable[[int], None],
) -> None:
    """Run the forward pass; `reached(n)` is called when the current state is the one before step n (after step n - 1).

    Collective on the solver's communicator.
    """
    for action in actions:
        match action:
            case Advance(first, last, tier):
                if tier is not None:
                    checkpoints.store(first, tier, steps.state, steps.time(first))
                for step in range(first, last):
                    steps.advance(step)
                    statistics.forward_steps += 1
                    reached(step + 1)
            case Record(step):
                steps.record(step, outlives_sweep=True)
                statistics.forward_steps += 1
                reached(step + 1)
            case EndForward():
                return
            case _:
                raise AssertionError(f"{action} before the end of the forward pass")


def run_backward(
    actions: Iterator[Action],
    steps: Steps,
    checkpoints: Checkpoints,
    statistics: SolveStatistics,
    reversed_to: Callable[[int], None],
) -> None:
    """Run the rest of the schedule; `reversed_to(n)` is called when the adjoint has reached the state before step n.

    Collective on the solver's communicator.
    """
    for action in actions:
        match action:
            case Advance(first, last, tier):
                if tier is not None:
                    checkpoints.store(first, tier, steps.state, steps.time(first))
                for step in range(first, last):
                    steps.advance(step)
                    statistics.recomputed_steps += 1
            case Record(step):
                steps.record(step, outlives_sweep=False)
                statistics.recomputed_steps += 1
            case Restore(step, _, discard):
                steps.overwrite(lambda state, step=step, discard=discard: checkpoints.restore(step, state, discard))  # type: ignore[misc]
            case Adjoint(step):
                steps.adjoint(step)
                statistics.adjoint_steps += 1
                reversed_to(step)
            case EndForward():
                raise AssertionError("the forward pass ended twice")
