"""The costs of the parts of a solve and its adjoint, as measured by a short probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from mpi4py import MPI


@dataclass(frozen=True)
class LevelCosts:
    """The costs of a step with a tape: the bytes of the tape, and the seconds of the step and of its adjoint.

    The adjoint includes the evaluation of f if the tape holds only stages.
    """

    bytes: int
    record: float
    adjoint: float


@dataclass(frozen=True)
class Costs:
    """The costs of a solve: seconds on the slowest rank, bytes on the fullest.

    `step` is a step without a tape. `copy` is a checkpoint copied in memory. `write` and `read` are a checkpoint
    written to and read from a slot on disk that was used before. `overlapped` is the share of these, 0 to 1, that
    overlaps with steps. `levels` has the costs of a step with a tape, by the level of the tape.
    """

    step: float
    copy: float
    write: float
    read: float
    overlapped: float
    levels: Mapping[str, LevelCosts]

    def agreed(self, comm: MPI.Comm) -> Costs:
        """Return the costs that all ranks plan with: those of the slowest and fullest ranks. Collective on `comm`."""
        figures = [self.step, self.copy, self.write, self.read, 1 - self.overlapped]
        for level in self.levels.values():
            figures += [level.bytes, level.record, level.adjoint]
        largest = np.array(figures, dtype=np.float64)
        comm.Allreduce(MPI.IN_PLACE, largest, MPI.MAX)
        step, copy, write, read, exposed, *rest = (float(value) for value in largest)
        levels = {
            name: LevelCosts(int(rest[3 * number]), *rest[3 * number + 1 : 3 * number + 3])
            for number, name in enumerate(self.levels)
        }
        return Costs(step, copy, write, read, 1 - exposed, levels)

    def seconds(
        self, level: str, steps: int, forward_steps: int, copies: int, disk_writes: int, disk_reads: int
    ) -> float:
        """Predict the seconds of a solve of `steps` steps and its adjoint, from its counts.

        Every step is recorded once. The disk takes at least the time of all its accesses one after the other.
        """
        recorded = self.levels[level]
        computing = (forward_steps - steps) * self.step + steps * (recorded.record + recorded.adjoint)
        moving = (copies + disk_writes + disk_reads) * self.copy
        disk = disk_writes * self.write + disk_reads * self.read
        return moving + max(computing + self.exposed * disk, disk)

    @property
    def exposed(self) -> float:
        """The share of the disk's time that delays steps."""
        return 1 - self.overlapped

    def as_dict(self) -> dict[str, Any]:
        """Return the costs for JSON."""
        return asdict(self)
