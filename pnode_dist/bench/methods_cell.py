"""One cell of the comparison: every way to the gradient of one experiment, with one method and number of steps.

`auto` runs in shares of the memory that back-propagation takes. In each it is to be as fast as the fastest baseline
that fits there with the gradient of the steps: then none is faster in that memory, and none that is as fast takes less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pnode_dist.bench.heap import Peak, bytes_in_use, uncollected
from pnode_dist.bench.methods_counts import Counted, Tally
from pnode_dist.bench.methods_experiments import Experiment
from pnode_dist.bench.methods_ways import Solved, Way, solved, steps_run_again
from pnode_dist.trajectory.budget import Trajectory

RIVALS = ("NODE-naive", "ANODE", "ACA")
"""The reverse-accurate baselines."""
REFERENCE = "NODE-naive"
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the reference's memory, in which `auto` runs."""
SAME_SPEED = 1.05
"""Times that differ by less are the same."""
_SEED = 0
_ATTEMPTS = 5


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
        """Find `bytes`, and count evaluations, in the first loss and gradient, for which solvers are made."""
        with uncollected():
            before = bytes_in_use()
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
        """The steps that were run again."""
        return steps_run_again(self.model)


@dataclass(frozen=True)
class Result:
    """What was found of one way. `seconds` of each round, in which all ways took their turns."""

    way: Way
    seconds: tuple[float, ...]
    bytes: int
    forward: int
    backward: int
    again: int
    error: float

    @property
    def median(self) -> float:
        """The usual seconds."""
        return statistics.median(self.seconds)


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
    """Whether `auto`, in a share of the reference's memory, is as fast as the fastest baseline that fits there.

    `ratio` is its time over that one's, the median over rounds. It is infinite where `auto` does not fit but a baseline
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
        """Whether it is."""
        return self.ratio <= SAME_SPEED


def in_share(share: float) -> str:
    """The name of `auto` in a share of the reference's memory."""
    return f"auto in {100 * share:.0f} %"


def measure_cell(experiment: Experiment, method: str, steps: int, rounds: int, ways: Sequence[Way]) -> Cell:
    """Measure memory and counts of every way, then of `auto` with its budgets, then the time of all in turns."""
    candidates = {}
    for way in ways:
        candidates[way.name] = Candidate(experiment, way, method, steps)
        candidates[way.name].measure()
    reference = candidates[REFERENCE].gradient.clone()
    working_set, shares, states = _needs(candidates)
    for share in SHARES:
        allowed = int(share * candidates[REFERENCE].bytes)
        found = _fitted(experiment, in_share(share), method, steps, allowed, working_set, shares, states)
        if found is not None:
            candidates[found.way.name] = found
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
    for _ in range(rounds):
        for name, candidate in candidates.items():
            with uncollected():
                seconds[name].append(candidate.seconds())
    results = {
        name: Result(candidate.way, tuple(seconds[name]), candidate.bytes, *counts[name], errors[name])
        for name, candidate in candidates.items()
    }
    return Cell(experiment.name, method, steps, results, working_set + sum(states))


def _needs(candidates: Mapping[str, Candidate]) -> tuple[int, list[float], list[int]]:
    """What this project takes besides its budget; each block's share of all graphs; the bytes of each block's state."""
    solution = candidates["solution"]
    checkpoints = [block.node.last_solve.checkpoint_bytes_peak for block in solution.blocks]
    states = [
        held // max(block.node.last_solve.forward_steps - 1, 1)
        for held, block in zip(checkpoints, solution.blocks, strict=True)
    ]
    graphs = [block.node.last_solve.graph_bytes for block in candidates["graph"].blocks]
    return solution.bytes - sum(checkpoints), [graph / sum(graphs) for graph in graphs], states


def _fitted(
    experiment: Experiment,
    name: str,
    method: str,
    steps: int,
    allowed: int,
    working_set: int,
    shares: Sequence[float],
    states: Sequence[int],
) -> Candidate | None:
    """`auto` with the largest budget found that keeps it within `allowed` bytes; None if there is none."""
    budget = allowed - working_set
    for _ in range(_ATTEMPTS):
        if budget < sum(states):
            return None
        # At least one checkpoint for each block, and what is left for the blocks as their graphs take it.
        left = budget - sum(states)
        budgets = iter([state + int(share * left) for state, share in zip(states, shares, strict=True)])
        way = Way(name, solved(lambda budgets=budgets: Trajectory(ram=next(budgets))))  # type: ignore[misc]
        candidate = Candidate(experiment, way, method, steps)
        candidate.measure()
        if candidate.bytes <= allowed:
            return candidate
        # A graph less at a time: the excess alone might not be one.
        budget -= max(candidate.bytes - allowed, allowed // 20)
    return None


def verdicts(cell: Cell) -> list[Verdict]:
    """What the cell says of `auto` in each share of the reference's memory; nothing where nothing fits."""
    found = []
    for share in SHARES:
        allowed = int(share * cell.results[REFERENCE].bytes)
        fitting = [name for name in RIVALS if cell.results[name].bytes <= allowed]
        ours = cell.results.get(in_share(share))
        if not fitting and ours is None:
            continue
        fastest = min(fitting, key=lambda name: cell.results[name].median, default="none")
        ratio, reason = 0.0, "nothing else fits"
        if ours is None:
            ratio = float("inf")
            reason = f"does not fit: takes {_mib(cell.least_bytes)} MiB at least, of {_mib(allowed)}"
        elif fitting:
            theirs = cell.results[fastest]
            ratio = statistics.median(a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True))
            more = ours.forward + ours.backward - theirs.forward - theirs.backward
            reason = f"{more:+d} evaluations of f, {_mib(ours.bytes - theirs.bytes)} MiB"
        found.append(Verdict(cell.experiment, cell.method, cell.steps, share, fastest, ratio, reason))
    return found


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
