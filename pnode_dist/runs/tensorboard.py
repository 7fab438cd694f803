"""Event files for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pnode_dist.errors import ConfigurationError

DIRECTORY = "tensorboard"


def check_available() -> None:
    """Raise `ConfigurationError` if tensorboardX, or a package that it needs, is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"[run] tensorboard = true: needs tensorboardX ({error}): pip install 'pnode-dist[tensorboard]'"
        ) from None


def remove(run: Path) -> None:
    """Remove the event files of a run, and no others."""
    for path in (run / DIRECTORY).glob("events.out.tfevents.*"):
        path.unlink()
    with suppress(OSError):
        (run / DIRECTORY).rmdir()


class EventFile:
    """Event file in `directory`.

    TensorBoard ignores points in earlier event files that lie after `step`, the step that the run resumes from.
    """

    def __init__(self, directory: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory), purge_step=step + 1, filename_suffix=f".{step}")

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Add a point at an optimiser step to the curve of each figure."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the added points and close the file."""
        self._writer.close()
