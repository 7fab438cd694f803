"""What an optimal checkpoint schedule costs, and a machine that refuses an illegal one."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cache
from math import comb
from typing import Any


def fewest_steps(steps: int, slots: int) -> int:
    """F(n, s) = (r + 1) n - C(s + r, r - 1), r the least integer with C(s + r, s) >= n.

    The fewest forward steps that reverse n steps with s checkpoints, the recorded runs included.
    A. Griewank, A. Walther: Algorithm 799: revolve, ACM Trans. Math. Softw. 26 (2000), eq. (2).
    """
    r = 0
    while comb(slots + r, slots) < steps:
        r += 1
        if slots == 0 and steps > 1:
            raise ValueError("several steps cannot be reversed without a checkpoint")
    return (r + 1) * steps - (comb(slots + r, r - 1) if r > 0 else 0)


@cache
def fewest_steps_by_recursion(steps: int, slots: int) -> int:
    """The same by dynamic programming over where the next checkpoint goes."""
    if steps == 1:
        return 1
    if slots == 1:
        return steps * (steps + 1) // 2
    return min(
        first + fewest_steps_by_recursion(steps - first, slots - 1) + fewest_steps_by_recursion(first, slots)
        for first in range(1, steps)
    )


def fewest_steps_by_search(steps: int, slots: int) -> int:
    """The same by Dijkstra's algorithm over everything that could be done with the checkpoints at all.

    A position is (current state, checkpoints held, steps not reversed yet). From it one may keep the current state,
    drop or restore a checkpoint, run a step (cost 1), or run the last open step recorded and reverse it (cost 1).
    """
    start: tuple[int, frozenset[int], int] = (0, frozenset(), steps)
    queue: list[tuple[int, int, tuple[int, frozenset[int], int]]] = [(0, 0, start)]
    done: set[Hashable] = set()
    ticket = 0
    while queue:
        cost, _, position = heapq.heappop(queue)
        if position in done:
            continue
        done.add(position)
        current, held, left = position
        if left == 0:
            return cost
        moves: list[tuple[int, tuple[int, frozenset[int], int]]] = []
        if current >= 0 and current not in held and len(held) < slots:
            moves.append((0, (current, held | {current}, left)))
        moves.extend((0, (current, held - {one}, left)) for one in held)
        moves.extend((0, (one, held, left)) for one in held)
        if 0 <= current < left - 1:
            moves.append((1, (current + 1, held, left)))
        if current == left - 1:
            moves.append((1, (-1, held, left - 1)))
        for extra, reached in moves:
            ticket += 1
            heapq.heappush(queue, (cost + extra, ticket, reached))
    raise ValueError("several steps cannot be reversed without a checkpoint")


def fewest_solve_steps(steps: int, checkpoints: int, tapes: int = 1) -> int:
    """The fewest forward steps of a whole solve that keeps the tapes of its last steps from the forward pass.

    The initial state is one more slot of `fewest_steps`. With n - k steps before the first of k tapes, the steps up to
    that one are reversed like n - k + 1 steps. Without tapes the state after the last step is reached like that before
    one more step, which is not taken.
    """
    return fewest_steps(steps - tapes + 1, checkpoints + 1) + tapes - 1


def fewest_solve_steps_within(
    ram: int, steps: int, checkpoint: int, tape: int, most_tapes: int = 1, disk: int = 0
) -> int:
    """The fewest forward steps of a solve with `ram` bytes for checkpoints and tapes, and `disk` more checkpoints."""
    return min(
        fewest_solve_steps(steps, (ram - tapes * tape) // checkpoint + disk, tapes)
        for tapes in range(min(most_tapes, steps) + 1)
        if tapes * tape <= ram
    )


def fewest_solve_steps_by_search(steps: int, checkpoints: int, tapes: int) -> int:
    """The same by Dijkstra's algorithm over everything that could be done in a solve at all.

    A position is (current state, checkpoints held, steps not reversed yet; None in the forward pass).
    """
    queue: list[tuple[int, int, tuple[int, frozenset[int], int | None]]] = [(0, 0, (0, frozenset(), None))]
    done: set[Hashable] = set()
    ticket = 0
    while queue:
        cost, _, position = heapq.heappop(queue)
        if position in done:
            continue
        done.add(position)
        current, held, left = position
        if left == 0:
            return cost
        moves: list[tuple[int, tuple[int, frozenset[int], int | None]]] = []
        if current > 0 and current not in held and len(held) < checkpoints:
            moves.append((0, (current, held | {current}, left)))
        moves.extend((0, (current, held - {one}, left)) for one in held)
        if left is None:
            if current < steps:
                moves.append((1, (current + 1, held, None)))
            else:
                moves.append((0, (-1, held, steps - tapes)))
        else:
            moves.extend((0, (one, held, left)) for one in (0, *held))
            if 0 <= current < left - 1:
                moves.append((1, (current + 1, held, left)))
            if current == left - 1:
                moves.append((1, (-1, held, left - 1)))
        for extra, reached in moves:
            ticket += 1
            heapq.heappush(queue, (cost + extra, ticket, reached))
    raise AssertionError("the initial state is always at hand")


class IllegalMoveError(Exception):
    """A schedule asked for what cannot be done."""


@dataclass
class ModelExecutor:
    """Runs a schedule on step numbers alone and raises `IllegalMoveError` where a real run would compute nonsense.

    Actions are known by the names of their classes and fields: Advance(first, last, checkpoint), Record(step),
    EndForward(), StartBackward(steps), Restore(step, tier, discard), Restart(), Adjoint(step); tiers by their value,
    "ram" or "disk".
    """

    steps: int
    capacity: dict[str, int]
    current: int | None = 0
    recorded: int | None = None
    held: dict[int, str] = field(default_factory=dict)
    reversed: list[int] = field(default_factory=list)
    forward_ended: bool = False
    forward_steps: int = 0
    recomputed_steps: int = 0
    most_held: dict[str, int] = field(default_factory=lambda: {"ram": 0, "disk": 0})

    def run(self, actions: Iterable[Any]) -> ModelExecutor:
        """Run the whole schedule and insist that it reversed everything and holds nothing."""
        for action in actions:
            getattr(self, f"_{type(action).__name__.lower()}")(action)
        self._insist(self.forward_ended, "the forward pass never ended")
        self._insist(len(self.reversed) == self.steps, f"reversed only {self.reversed}")
        self._insist(not self.held, f"still holds {self.held} at the end")
        return self

    def _insist(self, legal: bool, why: str) -> None:
        if not legal:
            raise IllegalMoveError(f"{why} (current state {self.current}, held {self.held}, reversed {self.reversed})")

    def _count(self, steps: int) -> None:
        if self.forward_ended:
            self.recomputed_steps += steps
        else:
            self.forward_steps += steps

    def _advance(self, action: Any) -> None:
        self._insist(self.current == action.first, f"cannot advance from {action.first}")
        self._insist(action.first < action.last <= self.steps, f"no steps from {action.first} to {action.last}")
        if action.checkpoint is not None:
            tier = action.checkpoint.value
            self._insist(action.first not in self.held, f"{action.first} is held already")
            self.held[action.first] = tier
            self.most_held[tier] = max(self.most_held[tier], list(self.held.values()).count(tier))
            self._insist(self.most_held[tier] <= self.capacity[tier], f"more than {self.capacity[tier]} in {tier}")
        self._count(action.last - action.first)
        self.current = action.last

    def _record(self, action: Any) -> None:
        self._insist(self.current == action.step, f"cannot record step {action.step}")
        self._insist(self.recorded is None, f"the record of step {self.recorded} would be lost")
        self._count(1)
        self.recorded, self.current = action.step, action.step + 1

    def _endforward(self, action: Any) -> None:
        self._insist(not self.forward_ended, "the forward pass ended twice")
        self._insist(self.current == self.steps, "the forward pass ended before the last step")
        self.forward_ended = True

    def _restore(self, action: Any) -> None:
        self._insist(self.held.get(action.step) == action.tier.value, f"{action.step} is not in {action.tier.value}")
        if action.discard:
            del self.held[action.step]
        self.current = action.step

    def _startbackward(self, action: Any) -> None:
        self._insist(action.steps == self.steps - len(self.reversed), f"{action.steps} steps are not those left")

    def _restart(self, action: Any) -> None:
        self.current = 0

    def _adjoint(self, action: Any) -> None:
        self._insist(self.forward_ended, "an adjoint step before the end of the forward pass")
        self._insist(self.recorded == action.step, f"step {action.step} is not the recorded one")
        self._insist(action.step == self.steps - 1 - len(self.reversed), f"step {action.step} out of order")
        self.reversed.append(action.step)
        self.recorded = self.current = None
