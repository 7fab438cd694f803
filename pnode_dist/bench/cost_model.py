"""Model of the time of a training step on any number of ranks, from measurements on a few ranks.

The time of a step is the sum of the work on a rank's block, the halo exchanges, and the sum of the parameter gradients
over all ranks. Work is a function of the number of points of a block, measured on one rank. A message of n bytes takes
latency + n / bandwidth (R. W. Hockney, Parallel Computing 20, 1994). An exchange sends two messages along each split
axis, one axis after the other. The sum takes ceil(log2 P) rounds of one message (recursive doubling). The model assumes
no overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Network:
    """Latency in seconds per message, and bandwidth in bytes per second."""

    latency: float
    bandwidth: float

    def message(self, size: float) -> float:
        """Seconds for one message of `size` bytes."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Work:
    """Seconds of a training step on one block against its number of points. Interpolates linearly.

    Below the smallest measured block the time is constant. Above the largest block the time per point is constant.
    """

    measured: tuple[tuple[int, float], ...]

    def seconds(self, points: float) -> float:
        """Return the seconds for a block of `points` points."""
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
    """Halo exchanges of a training step: one of `width` for each of `point_bytes`, forward and transposed alike."""

    point_bytes: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class Prediction:
    """Seconds of a training step on `ranks` ranks, in parts."""

    ranks: int
    work: float
    halo: float
    gradient_sum: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.work + self.halo + self.gradient_sum


@dataclass(frozen=True)
class CostModel:
    """Measured properties of a machine and a training step.

    `contention` is the slowdown factor of work when all cores of a node are busy. `cores` is the number of cores of a
    node. More ranks than cores on the one measured node share its cores. `gradient_bytes` is the size of the gradient
    that is summed over all ranks.
    """

    work: Work
    exchanges: Exchanges
    gradient_bytes: int
    network: Network
    contention: float
    cores: int

    def predict(self, shape: Sequence[int], processes: Sequence[int], *, one_node: bool) -> Prediction:
        """Predict a step on a periodic grid of `shape`, split over `processes` ranks along its axes.

        With `one_node` all ranks share one node, also if it has fewer cores than ranks. Otherwise every rank has a
        core.
        """
        ranks = math.prod(processes)
        block = [-(-n // p) for n, p in zip(shape, processes, strict=True)]
        slowed = self.contention if ranks > 1 else 1.0
        shared = max(1.0, ranks / self.cores) if one_node else 1.0
        work = self.work.seconds(math.prod(block)) * slowed * shared
        rounds = math.ceil(math.log2(ranks)) if ranks > 1 else 0
        return Prediction(ranks, work, self._halo(block, processes), rounds * self.network.message(self.gradient_bytes))

    def _halo(self, block: Sequence[int], processes: Sequence[int]) -> float:
        """Return the seconds of all exchanges. The last axis is exchanged first; later axes also send its ghosts."""
        width = self.exchanges.width
        seconds = 0.0
        padded = list(block)
        for axis in reversed(range(len(block))):
            if processes[axis] > 1:
                face = width * math.prod(padded[:axis] + padded[axis + 1 :])
                seconds += sum(2 * self.network.message(face * size) for size in self.exchanges.point_bytes)
            padded[axis] += 2 * width
        return seconds
