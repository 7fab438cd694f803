"""The metrics of a run as an event file for TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pnode_dist.errors import ConfigurationError
from pnode_dist.runs.metrics import Record, StepRecord

DIRECTORY = "tensorboard"
_NOT_DRAWN = {"step", "epoch", "wall_time"}


def check_available() -> None:
    """Raise `ConfigurationError` where there is nothing to write event files with."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ConfigurationError("[run] tensorboard = true: needs tensorboardX: pip install 'pnode-dist[tensorboard]'")


def remove(run: Path) -> None:
    """Remove the event files of a run, and nothing else."""
    for path in (run / DIRECTORY).glob("events.out.tfevents.*"):
        path.unlink()
    with suppress(OSError):
        (run / DIRECTORY).rmdir()


@contextmanager
def of_run(run: Path, wanted: bool, step: int) -> Iterator[EventFile | None]:
    """The event file of a run that goes on from `step`, while it is open; None if it is not wanted. Not collective."""
    if not wanted:
        yield None
        return
    file = EventFile(run, step)
    try:
        yield file
    finally:
        file.close()


class EventFile:
    """An event file of the run in a directory. TensorBoard leaves out what earlier ones have after `step`, from which
    the run goes on."""

    def __init__(self, run: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / DIRECTORY), purge_step=step + 1, filename_suffix=f".{step}")

    def write(self, record: Record) -> None:
        """Add a record: one curve for each of its figures, over optimiser steps."""
        if isinstance(record, StepRecord):
            figures = {f"step/{name}": value for name, value in asdict(record).items() if name not in _NOT_DRAWN}
        else:
            figures = {f"validation/{name}": value for name, value in record.figures.items()}
        for name, value in figures.items():
            self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Write what has been added, and close the file."""
        self._writer.close()
