"""What the parts of a solve and its adjoint take on the problem at hand, as measured by a short probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from mpi4py import MPI


@dataclass(frozen=True)
class LevelCosts:
    """A recorded step, of which graphs or stages are kept: its bytes, and the seconds of its run and of its adjoint.

    The seconds of an adjoint include the evaluation of f where only the stages were kept.
    """

    bytes: int
    record: float
    adjoint: float


@dataclass(frozen=True)
class Costs:
    """Seconds on the slowest rank, bytes on the fullest.

    `step`: a step that is not recorded. `copy`: a checkpoint copied in memory; `write` and `read`: to and from a slot
    on disk that was used before, if one waits for it. `overlapped` is the share of that, 0 to 1, that passes beside
    steps and does not hold them up. `levels` has the costs of each level of recording.
    """

    step: float
    copy: float
    write: float
    read: float
    overlapped: float
    levels: Mapping[str, LevelCosts]

    def agreed(self, comm: MPI.Comm) -> Costs:
        """The costs that all ranks plan with: those of the slowest and fullest. Collective on `comm`."""
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
        """A solve of `steps` steps with its adjoint, running `forward_steps` and moving checkpoints so often.

        Every step is recorded once. The disk cannot take less time than all of its accesses in turn.
        """
        recorded = self.levels[level]
        computing = (forward_steps - steps) * self.step + steps * (recorded.record + recorded.adjoint)
        moving = (copies + disk_writes + disk_reads) * self.copy
        disk = disk_writes * self.write + disk_reads * self.read
        return moving + max(computing + self.exposed * disk, disk)

    @property
    def exposed(self) -> float:
        """The share of the disk's time that holds steps up."""
        return 1 - self.overlapped

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        return asdict(self)
