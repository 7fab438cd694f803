"""One cell of the comparison: every gradient method on one experiment, with one solver and number of steps.

`auto` runs in shares of the memory of back-propagation. In each share it must be as fast as the fastest
reverse-accurate baseline that fits. Then no baseline is faster in that memory, and none of equal speed takes less.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pnode_dist.bench.methods.counts import Counted, Tally
from pnode_dist.bench.methods.experiments import Experiment
from pnode_dist.bench.methods.gradient_methods import GradientMethod, Solved, recomputed_steps, solved
from pnode_dist.bench.methods.heap import RESOLUTION, Peak, bytes_in_use, uncollected
from pnode_dist.checkpointing.budget import CheckpointBudget

RIVALS = ("NODE-naive", "ANODE", "ACA")
"""The reverse-accurate baselines."""
REFERENCE = "NODE-naive"
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the reference's memory in which `auto` runs."""
SAME_SPEED = 1.05
"""Largest ratio of two times that count as equal."""
MOST_TIMES = 5
"""Largest number of rounds, as a multiple of the requested rounds."""
_SEED = 0


class Candidate:
    """A gradient method on an experiment. `bytes` is its peak memory beyond model, data and gradient."""

    def __init__(self, experiment: Experiment, gradient_method: GradientMethod, method: str, steps: int) -> None:
        self.gradient_method = gradient_method
        self.tally = Tally()
        torch.manual_seed(_SEED)
        self.model = experiment.build(lambda func: gradient_method.block(Counted(func, self.tally), method, steps))
        self.bytes = 0
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    @property
    def blocks(self) -> list[Solved]:
        """Blocks solved by this project."""
        return [module for module in self.model.modules() if isinstance(module, Solved)]

    def seconds(self) -> float:
        """Return the processor seconds of one loss and its gradient. Processor time excludes other programs."""
        self.model.zero_grad(set_to_none=False)
        began = time.process_time()
        self.tally.differentiate(self.model())
        return time.process_time() - began

    def measure(self) -> None:
        """Measure `bytes` and count evaluations in the second loss and gradient. The first creates the solvers.

        Memory still held from then on is included.
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
        """Last gradient with respect to all parameters."""
        return torch.cat(
            [parameter.grad.reshape(-1) for parameter in self.model.parameters() if parameter.grad is not None]
        )

    @property
    def steps_again(self) -> int:
        """Number of recomputed steps."""
        return recomputed_steps(self.model)


@dataclass(frozen=True)
class Result:
    """Measurements of one gradient method. `seconds` holds one value per interleaved round."""

    gradient_method: GradientMethod
    seconds: tuple[float, ...]
    bytes: int
    forward: int
    backward: int
    again: int
    error: float

    @property
    def least(self) -> float:
        """Seconds of the fastest round. Other programs can only increase a time."""
        return min(self.seconds)


@dataclass(frozen=True)
class Cell:
    """All results by the name of the gradient method. `least_bytes` is the least memory of `auto`."""

    experiment: str
    method: str
    steps: int
    results: Mapping[str, Result]
    least_bytes: int


@dataclass(frozen=True)
class Verdict:
    """Comparison of `auto` with the fastest baseline that fits into a share of the reference's memory.

    `ratio` is the least time of `auto` over the least time of that baseline. It is infinite if only a baseline fits,
    and zero if no baseline fits. `reason` explains the ratio.
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
        """True if `auto` is at least as fast, within `SAME_SPEED`."""
        return self.ratio <= SAME_SPEED


def in_share(share: float) -> str:
    """Return the name of `auto` in a share of the reference's memory."""
    return f"auto in {100 * share:.0f} %"


def measure_cell(
    experiment: Experiment,
    method: str,
    steps: int,
    rounds: int,
    gradient_methods: Sequence[GradientMethod],
    enough: float = 0.0,
) -> Cell:
    """Measure memory and counts of every method, then of `auto` with its budgets, then the times of all, interleaved.

    If `rounds` take less than `enough` processor seconds, more rounds run, up to `MOST_TIMES` times as many.
    """
    candidates = {}
    for gradient_method in gradient_methods:
        candidates[gradient_method.name] = Candidate(experiment, gradient_method, method, steps)
        candidates[gradient_method.name].measure()
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
        # Reverse every other round, so that the state of the caches does not always burden the same candidate.
        for name, candidate in list(candidates.items())[:: -1 if number % 2 else 1]:
            with uncollected():
                seconds[name].append(candidate.seconds())
    results = {
        name: Result(candidate.gradient_method, tuple(seconds[name]), candidate.bytes, *counts[name], errors[name])
        for name, candidate in candidates.items()
    }
    return Cell(experiment.name, method, steps, results, least.bytes)


@dataclass(frozen=True)
class _Need:
    """Bytes of a block's state, and of its tape for one step."""

    state: int
    graph: int


def _needs(candidates: Mapping[str, Candidate]) -> list[_Need]:
    """Return the memory needs of each block, in order."""
    states = [block.checkpoint_bytes for block in candidates["solution"].blocks]
    solves = [block.node.last_solve for block in candidates["graph"].blocks]
    return [
        _Need(state, -(-solve.graph_bytes // solve.graph_steps)) for state, solve in zip(states, solves, strict=True)
    ]


def _auto(experiment: Experiment, name: str, method: str, steps: int, budgets: Sequence[int]) -> Candidate:
    """Return `auto` with a budget for each block."""
    left = iter(budgets)
    return Candidate(experiment, GradientMethod(name, solved(lambda: CheckpointBudget(ram=next(left)))), method, steps)


def _fitted(
    experiment: Experiment,
    name: str,
    method: str,
    steps: int,
    allowed: int,
    least: Candidate,
    needs: Sequence[_Need],
) -> Candidate | None:
    """Return `auto` with the largest budgets that keep it within `allowed` bytes, or None if none do.

    The first blocks get the smallest budgets: when they recompute steps, later blocks have already freed their memory.
    `least` is `auto` with one state per block. Most of its memory is in use only temporarily.
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
    """Return a budget for each block, where the first `left_out` of all steps store a state in place of a tape."""
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
    """Return that share of the memory in bytes, enlarged by the resolution of the peak."""
    return int(share * of * (1 + RESOLUTION))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
