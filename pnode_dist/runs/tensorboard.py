"""Event files for TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pnode_dist.errors import ConfigurationError

DIRECTORY = "tensorboard"


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


class EventFile:
    """An event file in `directory`. TensorBoard leaves out what earlier ones have after `step`, from which a run goes
    on."""

    def __init__(self, directory: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory), purge_step=step + 1, filename_suffix=f".{step}")

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Add a point at an optimiser step to the curve of each figure."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what has been added, and close the file."""
        self._writer.close()
