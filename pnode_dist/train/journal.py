"""Metrics and snapshots written by rank 0 during a run, and the requests that ranks exchange at every step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pnode_dist.config.tables import SnapshotConfig
from pnode_dist.runs import directory as run_directory
from pnode_dist.runs import snapshot_files
from pnode_dist.runs.heartbeat import Heartbeat
from pnode_dist.runs.metrics import MetricsFile, Record, StepRecord
from pnode_dist.runs.snapshot import Position, Snapshot
from pnode_dist.system.atomic_file import sync


@dataclass(frozen=True)
class StepRequests:
    """Requests of any rank to all ranks after a step: stop, take a snapshot, or end because a write has failed."""

    stop: bool = False
    snapshot: bool = False
    failed: bool = False

    def as_numbers(self) -> list[float]:
        """Return the requests as numbers, to be summed over the ranks."""
        return [float(self.stop), float(self.snapshot), float(self.failed)]


def requests_of(sums: Sequence[float]) -> StepRequests:
    """Return the requests of all ranks, given the sums of their numbers."""
    return StepRequests(*(value > 0 for value in sums))


class Journal:
    """Writer of the metrics and snapshots of a run.

    Files are written to `directory`; None, as on all ranks but 0, writes nothing. `config` is the text of the
    configuration and `problem` the hash of the problem's source; both are stored with every snapshot.
    A failed write sets `failure` instead of raising, because other ranks would then wait for this one. All ranks end
    at their next exchange of requests.
    """

    def __init__(
        self,
        directory: Path | None,
        snapshots: SnapshotConfig,
        config: str = "",
        heartbeat: Heartbeat | None = None,
        problem: str | None = None,
    ) -> None:
        self._directory, self._snapshots, self._config, self._problem = directory, snapshots, config, problem
        self._heartbeat = heartbeat
        self._first: StepRecord | None = None
        self._metrics = MetricsFile(None if directory is None else directory / run_directory.METRICS)
        self._writer = snapshot_files.Background()
        self._last_snapshot = time.monotonic()
        self._last_step = 0
        self.failure: str | None = None

    def write(self, record: Record) -> None:
        """Append a record to the metrics file."""
        if self._heartbeat is not None and isinstance(record, StepRecord):
            self._first = self._first or record
            self._heartbeat.stepped(record, self._first)
        try:
            self._metrics.write(record)
        except OSError as error:
            self.fail("metrics", error)

    def begin(self, position: Position) -> None:
        """Record the position that the run starts from."""
        if self._heartbeat is not None:
            loss = position.loss if math.isfinite(position.loss) else None
            self._heartbeat.update(step=position.step, epoch=position.epoch, loss=loss)

    def end_epoch(self, epoch: int, steps: int) -> None:
        """Record the end of an epoch of `steps` steps."""
        if self._heartbeat is not None:
            self._heartbeat.update(epoch=epoch + 1, epoch_steps=steps)

    def due(self, step: int) -> bool:
        """Return True if a snapshot is due after `step`. None is due while another is being written."""
        settings = self._snapshots
        if self._directory is None or not self._writer.idle or step == self._last_step:
            return False
        by_steps = settings.every_steps and step // settings.every_steps > self._last_step // settings.every_steps
        seconds = settings.every_minutes * 60 or math.inf
        return bool(by_steps) or time.monotonic() - self._last_snapshot >= seconds

    def check(self) -> None:
        """Set `failure` if a background write has failed."""
        if self._heartbeat is not None and self._heartbeat.failure is not None:
            self.failure = self.failure or f"{self._heartbeat.failure}; {self._last()}"
        try:
            self._writer.check()
        except OSError as error:
            self.fail("snapshot", error)

    @property
    def metrics_size(self) -> int:
        """Size of the metrics file in bytes."""
        return self._metrics.size

    def keep(self, snapshot: Snapshot | None, wait: bool = False) -> None:
        """Write a snapshot in the background; with `wait`, return only once it is on disk."""
        if self._directory is None or snapshot is None:
            return
        directory, saved = self._directory, datetime.now(UTC).isoformat(timespec="seconds")
        self._last_snapshot, self._last_step = time.monotonic(), snapshot.position.step

        def write() -> None:
            # The snapshot stores the size of the metrics file, so flush these bytes to disk first.
            sync(directory / run_directory.METRICS)
            snapshot_files.write(directory, snapshot, saved, self._config, self._snapshots.keep, self._problem)

        try:
            self._writer.start(write)
            if wait:
                self._writer.wait()
        except OSError as error:
            self.fail("snapshot", error)

    def last_snapshot(self) -> str:
        """Describe the last snapshot in words, after waiting for pending writes."""
        try:
            self._writer.wait()
        except OSError as error:
            self.fail("snapshot", error)
        return self._last()

    def fail(self, what: str, error: OSError) -> None:
        """Set `failure` to say that `what` could not be written, unless it is already set."""
        if self.failure is None:
            self.failure = (
                f"run directory {self._directory}: cannot write the {what}: {error.strerror or error}; {self._last()}"
            )

    def _last(self) -> str:
        steps = [] if self._directory is None else snapshot_files.steps_in(self._directory)
        return f"the last snapshot is that of step {steps[0]}" if steps else "there is no snapshot"

    def close(self) -> None:
        """Wait for pending writes and close the files."""
        self._writer.close()
        self.check()
        try:
            self._metrics.close()
        except OSError as error:
            self.fail("metrics", error)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
