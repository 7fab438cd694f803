"""Execute a schedule: the forward pass up to `EndForward`, and the backward pass from there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from pnode_dist.checkpointing.binomial import from_held_checkpoints
from pnode_dist.checkpointing.schedule import (
    Action,
    Adjoint,
    Advance,
    EndForward,
    Record,
    Restart,
    Restore,
    StartBackward,
    Tier,
)
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.checkpointing.store import Checkpoints, SpillError, State

_FETCHED_AHEAD = 2
_LOOK_AHEAD = 4096


class Steps(Protocol):
    """The steps of one solve, which act on a current state."""

    @property
    def state(self) -> State:
        """This rank's part of the current state, read-only."""
        ...

    def time(self, step: int) -> float:
        """Return the time at which `step` begins."""
        ...

    def count(self, step: int) -> int:
        """Return the number of time steps in `step`, which may be a segment of several."""
        ...

    def overwrite(self, write: Callable[[State], None]) -> None:
        """Replace the current state by calling `write` with an array to fill."""
        ...

    def restart(self) -> None:
        """Restore the initial state of the solve."""
        ...

    def advance(self, step: int, recompute: bool = False) -> None:
        """Run `step` on the current state. `recompute`: for the backward pass."""
        ...

    def record(self, step: int, recompute: bool = False) -> None:
        """Run `step` and keep its tape until `adjoint`. With `recompute` the tape need not survive another step."""
        ...

    def adjoint(self, step: int) -> None:
        """Reverse a step that has a tape, and free the tape."""
        ...


def run_forward(
    actions: Iterator[Action],
    steps: Steps,
    checkpoints: Checkpoints,
    statistics: SolveStatistics,
    reached: Callable[[int], None],
) -> None:
    """Run the forward pass. Collective on the solver's communicator.

    Calls `reached(n)` when the current state is the one before step n (after step n - 1).
    """
    for action in actions:
        match action:
            case Advance(first, last, tier):
                if tier is not None:
                    checkpoints.store(first, tier, steps.state, steps.time(first))
                for step in range(first, last):
                    steps.advance(step)
                    statistics.forward_steps += steps.count(step)
                    reached(step + 1)
            case Record(step):
                steps.record(step)
                statistics.forward_steps += steps.count(step)
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
    lost: Callable[[str | None], bool],
    ram_slots: int,
) -> bool:
    """Run the backward pass: the rest of the schedule. Collective on the solver's communicator.

    Calls `reversed_to(n)` when the adjoint has reached the state before step n. After each checkpoint read from disk,
    `lost(error)` reports this rank's error, or None, to the other ranks, and returns True if any rank lost the
    checkpoint. The rest of the schedule is then replaced by one with `ram_slots` checkpoints in memory and none on
    disk. Returns True if that happened.
    """
    disk_is_lost = False
    remaining: int | None = None
    ahead = _with_prefetch(actions, checkpoints)
    while (action := next(ahead, None)) is not None:
        match action:
            case Advance(first, last, tier):
                if tier is not None:
                    checkpoints.store(first, tier, steps.state, steps.time(first))
                for step in range(first, last):
                    steps.advance(step, recompute=True)
                    statistics.recomputed_steps += steps.count(step)
            case Record(step):
                steps.record(step, recompute=True)
                statistics.recomputed_steps += steps.count(step)
            case StartBackward(count):
                remaining = count
            case Restart():
                steps.restart()
            case Restore(step, tier, discard):
                error = _restore(steps, checkpoints, step, discard)
                if tier is Tier.DISK and lost(error):
                    assert remaining is not None
                    disk_is_lost = True
                    checkpoints.drop_disk()
                    ahead = from_held_checkpoints(remaining, checkpoints.in_memory(), ram_slots)
            case Adjoint(step):
                steps.adjoint(step)
                statistics.adjoint_steps += steps.count(step)
                remaining = step
                reversed_to(step)
            case EndForward():
                raise AssertionError("the forward pass ended twice")
    assert remaining == 0, "the schedule ended before the first step was reversed"
    return disk_is_lost


def _restore(steps: Steps, checkpoints: Checkpoints, step: int, discard: bool) -> str | None:
    """Restore a checkpoint. Returns the error as text, None for success."""
    error: str | None = None

    def write(state: State) -> None:
        nonlocal error
        try:
            checkpoints.restore(step, state, discard)
        except SpillError as reason:
            error = str(reason)

    steps.overwrite(write)
    return error


def _with_prefetch(actions: Iterator[Action], checkpoints: Checkpoints) -> Iterator[Action]:
    """Yield the same actions, and fetch the next checkpoints from disk while the actions before them run."""
    upcoming: deque[Action] = deque()
    fetched = 0
    while True:
        while fetched < _FETCHED_AHEAD and len(upcoming) < _LOOK_AHEAD and (action := next(actions, None)) is not None:
            upcoming.append(action)
            if isinstance(action, Restore) and action.tier is Tier.DISK:
                checkpoints.prefetch(action.step)
                fetched += 1
        if not upcoming:
            return
        action = upcoming.popleft()
        fetched -= isinstance(action, Restore) and action.tier is Tier.DISK
        yield action
