"""Metrics of a run: one JSON object per line, flushed after every record."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pnode_dist.system.json_lines import json_line


@dataclass(frozen=True)
class StepRecord:
    """Metrics of one optimiser step.

    `loss` is the mean over replicas of the loss before the step, `gradient_norm` the norm of its gradient before
    clipping, and `wall_time` the seconds since training began. The counts of steps and evaluations are those of one
    rank, because all ranks take the same steps. Bytes are summed over ranks. `peak_memory` is the largest resident size
    of any rank so far, in bytes. `graph_steps` counts the steps whose tapes were kept from the forward pass.
    `seconds_waiting_for_disk` is the time for which disk checkpoints blocked rank 0. `rejected_steps` counts the steps
    rejected by error control. `largest_rounding` is the largest relative rounding error of rank 0's checkpoints
    in a narrower `checkpoint_dtype`.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    wall_time: float
    gradient_norm: float
    forward_steps: int
    recomputed_steps: int
    adjoint_steps: int
    function_evaluations: int
    vjps: int
    bytes_written: int
    bytes_read: int
    peak_memory: int
    graph_steps: int = 0
    seconds_waiting_for_disk: float = 0.0
    rejected_steps: int = 0
    largest_rounding: float = 0.0


@dataclass(frozen=True)
class ValidationRecord:
    """Errors on the validation data after an epoch, in `units`. The first figure is the headline."""

    step: int
    epoch: int
    wall_time: float
    units: str
    figures: dict[str, float]


@dataclass(frozen=True)
class IterationRecord:
    """Metrics of one iteration of an inversion: the value of J and the norm of its gradient after it.

    `evaluations` counts the trajectories solved for J by this process, `products` those for Hessian or Jacobian
    products, and `wall_time` the seconds since it began.
    """

    iteration: int
    value: float
    gradient_norm: float
    evaluations: int
    products: int
    wall_time: float


Record = StepRecord | ValidationRecord
_KINDS: dict[type, str] = {StepRecord: "step", ValidationRecord: "validation", IterationRecord: "iteration"}


class MetricsFile:
    """Writer of `metrics.jsonl`, flushed after every line. `path=None`, as on all ranks but 0, writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("a", encoding="utf-8")

    def write(self, record: Record | IterationRecord) -> None:
        """Append one line with the fields of the record and its `kind`. Non-finite numbers become null."""
        if self._file is not None:
            line = {"kind": _KINDS[type(record)], **asdict(record)}
            self._file.write(json_line(line) + "\n")
            self._file.flush()

    @property
    def size(self) -> int:
        """Size of the file in bytes, including the part written before a resume."""
        return 0 if self._file is None else os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file. An incomplete last line, as left by a killed run, is skipped."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def peak_memory() -> int:
    """Return the peak resident size of this process, in bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux reports KiB, macOS bytes.
    return largest if sys.platform == "darwin" else largest * 1024
