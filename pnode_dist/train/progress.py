"""Showing how training goes: a bar on a terminal, lines elsewhere, on standard error of rank 0."""

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
    """One epoch: its mean loss, seconds and rate, and the headline validation figure if it was computed."""

    epoch: int
    epochs: int
    loss: float
    seconds: float
    steps_per_second: float
    validation: tuple[str, float] | None
    units: str

    def text(self) -> str:
        """One line for people."""
        figure = ""
        if self.validation is not None:
            figure = f"  {self.validation[0].replace('_', ' ')} {self.validation[1]:.4g} {self.units}".rstrip()
        return f"loss {self.loss:.6g}{figure}  {self.seconds:.2f} s/epoch  {self.steps_per_second:.3g} steps/s"


class Reporter(Protocol):
    """Who is told after every epoch."""

    def epoch(self, summary: EpochSummary) -> None:
        """Show one epoch."""
        ...


class Silence:
    """For all ranks but 0."""

    def epoch(self, summary: EpochSummary) -> None:
        """Show nothing."""


class Lines:
    """A line every `every` epochs, and whenever there is a validation figure."""

    def __init__(self, stream: TextIO, every: int) -> None:
        self._stream, self._every = stream, every

    def epoch(self, summary: EpochSummary) -> None:
        """Write the line if it is time for one."""
        wanted = summary.epoch % self._every == 0 or summary.epoch in (1, summary.epochs)
        if wanted or summary.validation is not None:
            print(f"epoch {summary.epoch}/{summary.epochs}  {summary.text()}", file=self._stream, flush=True)


class Bar:
    """A bar over the epochs; validation figures stay above it as lines."""

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

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def reporter(shown: bool, epochs: int, every: int) -> AbstractContextManager[Reporter]:
    """What suits standard error; nothing at all unless `shown`."""
    if not shown:
        return nullcontext(Silence())
    console = Console(stderr=True)
    if console.is_terminal:
        return Bar(console, epochs)
    return nullcontext(Lines(sys.stderr, every))
