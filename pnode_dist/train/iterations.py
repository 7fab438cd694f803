"""Progress of an inversion on standard error of rank 0, and its metrics and heartbeat."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from pnode_dist.inverse import Progress
from pnode_dist.runs.endings import RunDirectoryError
from pnode_dist.runs.heartbeat import Heartbeat
from pnode_dist.runs.metrics import IterationRecord, MetricsFile


class Iterations:
    """Context manager that shows and writes each iteration of an inversion: a bar on a terminal, lines otherwise.

    `directory` is None on all ranks but 0, which do nothing.
    """

    def __init__(self, directory: Path | None, most: int, heartbeat: Heartbeat) -> None:
        self._directory, self._heartbeat, self._began = directory, heartbeat, time.perf_counter()
        self._metrics = MetricsFile(None)
        self._last: Progress | None = None
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if directory is not None and console.is_terminal:
            columns = TextColumn("iteration"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}")
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task("", total=most)

    def show(self, progress: Progress, memory: int) -> None:
        """Show an iteration, and write its record. `memory` is the peak size of the largest rank, in bytes.

        Raises `RunDirectoryError` on rank 0 if the record cannot be written.
        """
        if self._directory is None:
            return
        seconds = time.perf_counter() - self._began
        self._last = progress
        try:
            self._metrics.write(IterationRecord(**vars(progress), wall_time=seconds))
        except OSError as error:
            raise RunDirectoryError(f"run directory {self._directory}: {error.strerror or error}") from None
        self._heartbeat.update(
            step=progress.iteration,
            epoch=max(progress.iteration, 1),
            epoch_steps=1,
            loss=progress.value,
            stepped=time.time(),
            steps_per_second=progress.iteration / seconds,
            bytes_spilt=None,
            peak_memory=memory,
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.iteration, description=_text(progress))
        else:
            print(f"iteration {progress.iteration}  {_text(progress)}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Declare the last iteration the end of the run, for `pnode-dist status`."""
        if self._last is not None:
            done = max(self._last.iteration, 1)
            self._heartbeat.update(epochs=done, epoch=done + 1)

    def __enter__(self) -> Iterations:
        if self._directory is not None:
            self._metrics = MetricsFile(self._directory / "metrics.jsonl")
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._metrics.close()


def _text(progress: Progress) -> str:
    evaluations = progress.evaluations + progress.products
    return f"J {progress.value:.6g}  gradient {progress.gradient_norm:.3g}  {evaluations} solves"
