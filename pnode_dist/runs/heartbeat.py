"""Heartbeat of a run: `heartbeat.json` in its directory, rewritten every few seconds, for monitoring."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pnode_dist.runs.endings import Preempted
from pnode_dist.runs.lock import RunLock
from pnode_dist.runs.metrics import StepRecord
from pnode_dist.system.atomic_file import write_atomically

if TYPE_CHECKING:
    from pnode_dist.distributed.mesh import Mesh

HEARTBEAT = "heartbeat.json"
INTERVAL = 5.0


@dataclass(frozen=True)
class HeartbeatRecord:
    """Status of a run at one time.

    `state` is `running`, `finished`, `preempted` or `failed`, and `message` gives the reason. `written` and `stepped`
    are the times of this heartbeat and of the last step, in seconds since the epoch. `steps_per_second` is the mean
    rate since this process began. `epoch_steps` is the number of steps of a whole epoch, 0 before the first is
    complete. Bytes are summed over all ranks since the process began; None if they are not counted.
    """

    host: str
    pid: int
    job: str
    ranks: int
    hosts: int
    mesh: str
    epochs: int
    started: float
    state: str = "running"
    message: str = ""
    written: float = 0.0
    stepped: float = 0.0
    step: int = 0
    epoch: int = 1
    epoch_steps: int = 0
    steps_per_second: float = 0.0
    loss: float | None = None
    bytes_spilt: int | None = 0
    peak_memory: int = 0


class Heartbeat:
    """Thread that writes the `HeartbeatRecord` and renews the lock every few seconds; `directory=None` disables it.

    `failure` describes the first failed write or renewal; None if there was none.
    """

    def __init__(self, directory: Path | None, beat: HeartbeatRecord, renew: Callable[[], None]) -> None:
        self._directory, self._beat, self._renew = directory, beat, renew
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="pnode-dist-heartbeat", daemon=True)
        self.failure: str | None = None

    def update(self, **changes: object) -> None:
        """Change fields of the `HeartbeatRecord`."""
        self._beat = replace(self._beat, **changes)  # type: ignore[arg-type]

    def stepped(self, record: StepRecord, first: StepRecord) -> None:
        """Record a step; `first` is the first step of this process."""
        seconds = record.wall_time - first.wall_time
        self.update(
            step=record.step,
            epoch=record.epoch,
            loss=record.loss,
            stepped=time.time(),
            steps_per_second=(record.step - first.step) / seconds if seconds > 0 else 0.0,
            bytes_spilt=(self._beat.bytes_spilt or 0) + record.bytes_written,
            peak_memory=record.peak_memory,
        )

    def _work(self) -> None:
        while True:
            self._write()
            if self._ended.wait(INTERVAL):
                return

    def _write(self) -> None:
        assert self._directory is not None
        try:
            self._renew()
            content = json.dumps(asdict(replace(self._beat, written=time.time()))) + "\n"
            write_atomically(self._directory / HEARTBEAT, content.encode(), durable=False)
        except OSError as error:
            self.failure = self.failure or f"run directory {self._directory}: {error.strerror or error}"

    def __enter__(self) -> Heartbeat:
        if self._directory is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._directory is not None:
            self._ended.set()
            self._thread.join()
            state = "finished" if error is None else "preempted" if isinstance(error, Preempted) else "failed"
            self.update(state=state, message=" ".join(str(error or "").split()))
            self._write()


def of_run(directory: Path, lock: RunLock | None, mesh: Mesh, epochs: int) -> Heartbeat:
    """Create the heartbeat of a starting run; rank 0 writes it and renews `lock`. Collective on the world."""
    hosts = mesh.gather_object(socket.gethostname()) or ()
    beat = HeartbeatRecord(
        socket.gethostname(),
        os.getpid(),
        os.environ.get("SLURM_JOB_ID", ""),
        mesh.size,
        len(set(hosts)),
        f"state {mesh.state_ranks} x data {mesh.data_replicas}",
        epochs,
        time.time(),
    )
    return Heartbeat(None if lock is None else directory, beat, lambda: None if lock is None else lock.renew())


def read_heartbeat(directory: Path) -> HeartbeatRecord | None:
    """Read the last heartbeat of a run; None if there is none."""
    try:
        return HeartbeatRecord(**json.loads((directory / HEARTBEAT).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
