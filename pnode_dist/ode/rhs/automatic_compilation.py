"""`compile="auto"`: compile once solves have taken as long as a compilation, and keep what is faster.

The number of solves to come is not known. Whoever compiles after the time of one compilation takes at most twice the
time of the best decision in hindsight (the ski rental problem; A. Karlin, M. Manasse, L. Rudolph, D. Sleator:
Competitive snoopy caching, Algorithmica 3 (1988)).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from mpi4py import MPI

COMPILATION = 20.0
"""About the seconds of one compilation."""
_COMPARED = 3


@dataclass
class Times:
    """The seconds and the steps of solves that have ended."""

    seconds: float = 0.0
    steps: int = 0

    @property
    def of_a_step(self) -> float:
        """Mean seconds of a step."""
        return self.seconds / max(self.steps, 1)


@dataclass
class AutomaticCompilation:
    """The times of a module's solves, and the decision on the next one.

    `compiles`: it is compiled. `is_final`: the times of both ways were compared, after three compiled solves.
    """

    compilation: float = COMPILATION
    compiles: bool = False
    is_final: bool = False
    plain: Times = field(default_factory=Times)
    compiled: Times = field(default_factory=Times)
    _solves: int = 0

    def next_solve(self, comm: MPI.Comm) -> Times:
        """Decide on a solve that begins, and return the times to which it adds its own. Collective on `comm`.

        All ranks decide alike, by the slowest. The first compiled solve contains the compilation, and does not count.
        """
        if not self.is_final:
            found = np.array([self.plain.seconds, self.plain.of_a_step, self.compiled.of_a_step])
            if comm.size > 1:
                comm.Allreduce(MPI.IN_PLACE, found, MPI.MAX)
            if not self.compiles:
                self.compiles = bool(found[0] >= self.compilation)
            elif self._solves > _COMPARED:
                self.compiles, self.is_final = bool(found[2] < found[1]), True
        if not self.compiles:
            return self.plain
        self._solves += 1
        return self.compiled if self._solves > 1 else Times()
