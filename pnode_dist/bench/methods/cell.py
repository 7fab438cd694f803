"""One cell of the comparison: every way to the gradient of one experiment, with one method and number of steps.

`auto` runs in shares of the memory that back-propagation takes. In each it is to be as fast as the fastest baseline
that fits there with the gradient of the steps: then none is faster in that memory, and none that is as fast takes less.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pnode_dist.bench.methods.counts import Counted, Tally
from pnode_dist.bench.methods.experiments import Experiment
from pnode_dist.bench.methods.heap import RESOLUTION, Peak, bytes_in_use, uncollected
from pnode_dist.bench.methods.ways import Solved, Way, solved, steps_run_again
from pnode_dist.checkpointing.budget import CheckpointBudget

RIVALS = ("NODE-naive", "ANODE", "ACA")
"""The reverse-accurate baselines."""
REFERENCE = "NODE-naive"
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the reference's memory, in which `auto` runs."""
SAME_SPEED = 1.05
"""Times that differ by less are the same."""
MOST_TIMES = 5
"""As many rounds as were asked for there are at most."""
_SEED = 0


class Candidate:
    """A way to the gradient of an experiment. `bytes` is the most memory it takes beyond model, data and gradient."""

    def __init__(self, experiment: Experiment, way: Way, method: str, steps: int) -> None:
        self.way = way
        self.tally = Tally()
        torch.manual_seed(_SEED)
        self.model = experiment.build(lambda func: way.block(Counted(func, self.tally), method, steps))
        self.bytes = 0
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    @property
    def blocks(self) -> list[Solved]:
        """The blocks that this project solves."""
        return [module for module in self.model.modules() if isinstance(module, Solved)]

    def seconds(self) -> float:
        """Seconds of processor time of one loss and its gradient: what other programs take does not count."""
        self.model.zero_grad(set_to_none=False)
        began = time.process_time()
        self.tally.differentiate(self.model())
        return time.process_time() - began

    def measure(self) -> None:
        """Find `bytes`, and count evaluations, in the second loss and gradient: for the first, solvers are made.

        What is kept from then on counts.
        """
        with uncollected():
            before = bytes_in_use()
            self.seconds()
            self.tally.reset()
            with Peak() as peak:
                self.seconds()
        self.bytes = max(peak.bytes - before, 0)

    @property
    def gradient(self) -> torch.Tensor:
        """The last gradient, by all parameters."""
        return torch.cat(
            [parameter.grad.reshape(-1) for parameter in self.model.parameters() if parameter.grad is not None]
        )

    @property
    def steps_again(self) -> int:
        """The recomputed steps."""
        return steps_run_again(self.model)


@dataclass(frozen=True)
class Result:
    """The measurements of one gradient method. `seconds` are those of each interleaved round."""

    way: Way
    seconds: tuple[float, ...]
    bytes: int
    forward: int
    backward: int
    again: int
    error: float

    @property
    def least(self) -> float:
        """The seconds of the round in which least came in between: what other programs cost is only ever added."""
        return min(self.seconds)


@dataclass(frozen=True)
class Cell:
    """All results by the names of the ways. `least_bytes` is what `auto` cannot do without."""

    experiment: str
    method: str
    steps: int
    results: Mapping[str, Result]
    least_bytes: int


@dataclass(frozen=True)
class Verdict:
    """The verdict on `auto`: as fast as the fastest baseline that fits into a share of the reference's memory.

    `ratio` is its time over that one's, the least of each. It is infinite where `auto` does not fit but a baseline
    does, and zero where no baseline does. `reason` says what is in the way.
    """

    experiment: str
    method: str
    steps: int
    share: float
    fastest: str
    ratio: float
    reason: str

    @property
    def holds(self) -> bool:
        """True if `auto` is as fast."""
        return self.ratio <= SAME_SPEED


def in_share(share: float) -> str:
    """The name of `auto` in a share of the reference's memory."""
    return f"auto in {100 * share:.0f} %"


def measure_cell(
    experiment: Experiment, method: str, steps: int, rounds: int, ways: Sequence[Way], enough: float = 0.0
) -> Cell:
    """Measure memory and counts of every way, then of `auto` with its budgets, then the time of all in turns.

    Where `rounds` take less than `enough` seconds of processor time there are more of them, up to `MOST_TIMES` as many.
    """
    candidates = {}
    for way in ways:
        candidates[way.name] = Candidate(experiment, way, method, steps)
        candidates[way.name].measure()
    reference = candidates[REFERENCE].gradient.clone()
    needs = _needs(candidates)
    least = _auto(experiment, "auto", method, steps, [need.state for need in needs])
    least.measure()
    for share in SHARES:
        allowed = _allowed(share, candidates[REFERENCE].bytes)
        found = _fitted(experiment, in_share(share), method, steps, allowed, least, needs)
        if found is not None:
            candidates[in_share(share)] = found
    errors = {
        name: float((candidate.gradient - reference).norm() / reference.norm())
        for name, candidate in candidates.items()
    }
    counts = {
        name: (
            candidate.tally.evaluations["forward"],
            candidate.tally.evaluations["backward"],
            candidate.steps_again,
        )
        for name, candidate in candidates.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    began = time.process_time()
    for number in range(MOST_TIMES * rounds):
        if number >= rounds and time.process_time() - began > enough:
            break
        # Whoever comes after one that leaves much memory in the caches does so in every other round alone.
        for name, candidate in list(candidates.items())[:: -1 if number % 2 else 1]:
            with uncollected():
                seconds[name].append(candidate.seconds())
    results = {
        name: Result(candidate.way, tuple(seconds[name]), candidate.bytes, *counts[name], errors[name])
        for name, candidate in candidates.items()
    }
    return Cell(experiment.name, method, steps, results, least.bytes)


@dataclass(frozen=True)
class _Need:
    """The bytes of a block's state, and of its graph for one step."""

    state: int
    graph: int


def _needs(candidates: Mapping[str, Candidate]) -> list[_Need]:
    """Return the memory that each block needs, the first one first."""
    states = [
        block.node.last_solve.checkpoint_bytes_peak // max(block.node.last_solve.forward_steps - 1, 1)
        for block in candidates["solution"].blocks
    ]
    solves = [block.node.last_solve for block in candidates["graph"].blocks]
    return [
        _Need(state, -(-solve.graph_bytes // solve.graph_steps)) for state, solve in zip(states, solves, strict=True)
    ]


def _auto(experiment: Experiment, name: str, method: str, steps: int, budgets: Sequence[int]) -> Candidate:
    """`auto` with a budget for each block."""
    left = iter(budgets)
    return Candidate(experiment, Way(name, solved(lambda: CheckpointBudget(ram=next(left)))), method, steps)


def _fitted(
    experiment: Experiment,
    name: str,
    method: str,
    steps: int,
    allowed: int,
    least: Candidate,
    needs: Sequence[_Need],
) -> Candidate | None:
    """`auto` with the largest budgets that keep it within `allowed` bytes; None if there are none.

    The first blocks get the least: when they run steps again, those after them have given their memory back. `least`
    is what it takes with one state for each block, most of which is needed only at times.
    """
    if least.bytes > allowed:
        return None
    left_out, all_of_them = 0, steps * len(needs)
    while True:
        budgets = _budgets(needs, steps, left_out)
        excess = sum(budgets) - allowed
        if excess <= 0:
            candidate = _auto(experiment, name, method, steps, budgets)
            candidate.measure()
            if candidate.bytes <= allowed:
                return candidate
            excess = candidate.bytes - allowed
        if left_out == all_of_them:
            return least
        while excess > 0 and left_out < all_of_them:
            excess -= needs[left_out // steps].graph - needs[left_out // steps].state
            left_out += 1


def _budgets(needs: Sequence[_Need], steps: int, left_out: int) -> list[int]:
    """A budget for each block, where of all steps so many, the first ones, are to have no graph but a state."""
    budgets = []
    for number, need in enumerate(needs):
        without = min(max(left_out - number * steps, 0), steps)
        budgets.append((steps - without) * need.graph + max(min(without, steps - 1), 1) * need.state)
    return budgets


def verdicts(cell: Cell) -> list[Verdict]:
    """Return the verdict on `auto` for each share of the reference's memory into which anything fits."""
    found = []
    for share in SHARES:
        allowed = _allowed(share, cell.results[REFERENCE].bytes)
        fitting = [name for name in RIVALS if cell.results[name].bytes <= allowed]
        ours = cell.results.get(in_share(share))
        if not fitting and ours is None:
            continue
        fastest = min(fitting, key=lambda name: cell.results[name].least, default="none")
        ratio, reason = 0.0, "nothing else fits"
        if ours is None:
            ratio = float("inf")
            reason = f"does not fit: takes {_mib(cell.least_bytes)} MiB at least, of {_mib(allowed)}"
        elif fitting:
            theirs = cell.results[fastest]
            ratio = ours.least / theirs.least
            more = ours.forward + ours.backward - theirs.forward - theirs.backward
            reason = f"{more:+d} evaluations of f, {_mib(ours.bytes - theirs.bytes)} MiB"
        found.append(Verdict(cell.experiment, cell.method, cell.steps, share, fastest, ratio, reason))
    return found


def _allowed(share: float, of: int) -> int:
    """The bytes that are not told apart from that share of the memory."""
    return int(share * of * (1 + RESOLUTION))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
