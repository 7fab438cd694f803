"""Model of the time of a training step with Fourier transforms, from measurements on a few ranks.

The work on a slab is measured on one rank, for several numbers of points. A transpose sends every other rank one
message. It costs (P - 1) latencies, the bytes over the bandwidth (R. Thakur, R. Rabenseifner, W. Gropp, Int. J. High
Perform. Comput. Appl. 19, 49 (2005), pairwise exchange), and the packing and unpacking of what is sent. Its adjoint
costs the same. The model assumes no overlap, and a bandwidth that does not depend on the number of messages under way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pnode_dist.bench.cost_model import Network, Prediction, Work


@dataclass(frozen=True)
class SpectralModel:
    """Measured properties of a machine and a step. `fields` are the numbers of fields of the transposes of a step.

    `mode_bytes` is the size of a complex number, `packing` the seconds to copy a byte twice, and `gradient_bytes` the
    size of the gradient that is summed. `contention` and `cores` are those of `CostModel`.
    """

    work: Work
    fields: Sequence[int]
    mode_bytes: int
    gradient_bytes: int
    network: Network
    packing: float
    contention: float
    cores: int

    def predict(self, shape: Sequence[int], ranks: int, *, one_node: bool) -> Prediction:
        """Predict a step on a grid of `shape` in slabs of `ranks` ranks. The transposes are its `halo`.

        With `one_node` all ranks share one node, also if it has fewer cores than ranks. Otherwise every rank has a
        core.
        """
        rows = -(-shape[0] // ranks)
        slowed = self.contention if ranks > 1 else 1.0
        shared = max(1.0, ranks / self.cores) if one_node else 1.0
        work = self.work.seconds(rows * shape[1]) * slowed * shared
        rounds = math.ceil(math.log2(ranks)) if ranks > 1 else 0
        transposes = 2 * sum(self._transpose(rows, shape[1] // 2 + 1, ranks, fields) for fields in self.fields)
        return Prediction(ranks, work, transposes, rounds * self.network.message(self.gradient_bytes))

    def _transpose(self, rows: int, columns: int, ranks: int, fields: int) -> float:
        """Return the seconds of one transpose of so many fields of a slab."""
        if ranks == 1:
            return 0.0
        sent = rows * columns * fields * self.mode_bytes * (ranks - 1) / ranks
        return (ranks - 1) * self.network.latency + sent * (1 / self.network.bandwidth + self.packing)

    def most_ranks(self, shape: Sequence[int]) -> int:
        """Return the largest number of ranks that can have a slab of the field and of its spectrum."""
        return min(shape[0], shape[1] // 2 + 1)
