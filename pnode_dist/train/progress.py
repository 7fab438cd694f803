"""Progress display on standard error of rank 0: a bar on a terminal, lines otherwise."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class EpochSummary:
    """Summary of an epoch: mean loss, seconds, steps per second, and the headline validation figure if computed."""

    epoch: int
    epochs: int
    loss: float
    seconds: float
    steps_per_second: float
    validation: tuple[str, float] | None
    units: str

    def text(self) -> str:
        """Format the summary as one line of text."""
        figure = ""
        if self.validation is not None:
            figure = f"  {self.validation[0].replace('_', ' ')} {self.validation[1]:.4g} {self.units}".rstrip()
        return f"loss {self.loss:.6g}{figure}  {self.seconds:.2f} s/epoch  {self.steps_per_second:.3g} steps/s"


class Reporter(Protocol):
    """Interface of a progress display, called after every epoch."""

    def epoch(self, summary: EpochSummary) -> None:
        """Display one epoch."""
        ...


class SilentReporter:
    """Reporter without output, for all ranks but 0."""

    def epoch(self, summary: EpochSummary) -> None:
        """Do nothing."""


class LineReporter:
    """Print a line every `every` epochs, and after each validation."""

    def __init__(self, stream: TextIO, every: int) -> None:
        self._stream, self._every = stream, every

    def epoch(self, summary: EpochSummary) -> None:
        """Print the line if it is due."""
        wanted = summary.epoch % self._every == 0 or summary.epoch in (1, summary.epochs)
        if wanted or summary.validation is not None:
            print(f"epoch {summary.epoch}/{summary.epochs}  {summary.text()}", file=self._stream, flush=True)


class BarReporter:
    """Display a progress bar over the epochs; print each epoch with a validation figure as a line above it."""

    def __init__(self, console: Console, epochs: int) -> None:
        self._progress = Progress(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=epochs)

    def epoch(self, summary: EpochSummary) -> None:
        """Advance the bar."""
        if summary.validation is not None:
            self._progress.console.print(f"epoch {summary.epoch}/{summary.epochs}  {summary.text()}", highlight=False)
        self._progress.update(self._task, completed=summary.epoch, description=summary.text())

    def __enter__(self) -> BarReporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def reporter(shown: bool, epochs: int, every: int) -> AbstractContextManager[Reporter]:
    """Create a bar if standard error is a terminal, lines otherwise; show nothing unless `shown`."""
    if not shown:
        return nullcontext(SilentReporter())
    console = Console(stderr=True)
    if console.is_terminal:
        return BarReporter(console, epochs)
    return nullcontext(LineReporter(sys.stderr, every))
