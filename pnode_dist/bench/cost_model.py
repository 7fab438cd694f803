"""A model of the time of a training step on any number of ranks, from measurements on few.

A step is the work on a rank's block, the halo exchanges, and the sum of the parameters' gradients over all ranks. Work
is a function of the points of a block that was measured on one rank. A message of n bytes takes latency + n / bandwidth
(R. W. Hockney, Parallel Computing 20, 1994). An exchange sends two messages along each axis that is split, one axis
after the other; the sum takes ceil(log2 P) rounds of one message (recursive doubling). Nothing overlaps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Network:
    """Seconds that any message takes, and bytes a second."""

    latency: float
    bandwidth: float

    def message(self, size: float) -> float:
        """Seconds for one message of `size` bytes."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Work:
    """Seconds of a training step on one block by its points: measured ones, linear in between.

    Fewer points than were measured take as long as the fewest, more are as dear, each, as those of the largest block.
    """

    measured: tuple[tuple[int, float], ...]

    def seconds(self, points: float) -> float:
        """Seconds for a block of so many points."""
        known = sorted(self.measured)
        if points <= known[0][0]:
            return known[0][1]
        for (less, low), (more, high) in pairwise(known):
            if points <= more:
                return low + (high - low) * (points - less) / (more - less)
        most, seconds = known[-1]
        return seconds * points / most


@dataclass(frozen=True)
class Exchanges:
    """The halo exchanges of a training step: one of width `width` for each of `point_bytes`, there and back alike."""

    point_bytes: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class Prediction:
    """Seconds of a training step on `ranks` ranks, and of its parts."""

    ranks: int
    work: float
    halo: float
    gradient_sum: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.work + self.halo + self.gradient_sum


@dataclass(frozen=True)
class CostModel:
    """The measured facts of a machine and a training step.

    `contention` is by how much work takes longer when all cores of a node work, `cores` how many a node has: more ranks
    than cores, on the one node that was measured, share them. `gradient_bytes` are summed over all ranks.
    """

    work: Work
    exchanges: Exchanges
    gradient_bytes: int
    network: Network
    contention: float
    cores: int

    def predict(self, shape: Sequence[int], processes: Sequence[int], *, one_node: bool) -> Prediction:
        """A step on a periodic grid of `shape` split over `processes` ranks along its axes.

        With `one_node` all ranks are on one node, however few cores it has; else every rank has a core.
        """
        ranks = math.prod(processes)
        block = [-(-n // p) for n, p in zip(shape, processes, strict=True)]
        slowed = self.contention if ranks > 1 else 1.0
        shared = max(1.0, ranks / self.cores) if one_node else 1.0
        work = self.work.seconds(math.prod(block)) * slowed * shared
        rounds = math.ceil(math.log2(ranks)) if ranks > 1 else 0
        return Prediction(ranks, work, self._halo(block, processes), rounds * self.network.message(self.gradient_bytes))

    def _halo(self, block: Sequence[int], processes: Sequence[int]) -> float:
        """Seconds of all exchanges. The last axis goes first; the others take its ghosts along."""
        width = self.exchanges.width
        seconds = 0.0
        padded = list(block)
        for axis in reversed(range(len(block))):
            if processes[axis] > 1:
                face = width * math.prod(padded[:axis] + padded[axis + 1 :])
                seconds += sum(2 * self.network.message(face * size) for size in self.exchanges.point_bytes)
            padded[axis] += 2 * width
        return seconds
