"""Result of a benchmark: rows of measurements, and checks against targets."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from mpi4py import MPI
from rich.console import Console
from rich.table import Table

_PACKAGES = ("pnode_dist", "torch", "petsc", "petsc4py", "mpi4py", "torchdiffeq", "torchode")

Row = dict[str, str | int | float]


@dataclass(frozen=True)
class Check:
    """A measured value against its target.

    Holds if the value is at most the target, or with `at_least` if it is at least the target.
    """

    name: str
    value: float
    target: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """True if the value meets its target."""
        return self.value >= self.target if self.at_least else self.value <= self.target

    def as_dict(self) -> dict[str, Any]:
        """`{name, value, target, at_least, holds}`."""
        return {**asdict(self), "holds": self.holds}


@dataclass(frozen=True)
class Report:
    """Rows with equal keys, checks, explanatory notes, and the machine they were measured on.

    `further` maps titles to further tables of rows.
    """

    name: str
    rows: Sequence[Row]
    checks: Sequence[Check]
    notes: Sequence[str] = ()
    machine: dict[str, Any] = field(default_factory=lambda: machine_facts())
    further: Mapping[str, Sequence[Row]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "name": self.name,
            "rows": list(self.rows),
            "checks": [check.as_dict() for check in self.checks],
            "notes": list(self.notes),
            "further": {title: list(rows) for title, rows in self.further.items()},
            "machine": self.machine,
        }

    def show(self, console: Console) -> None:
        """Print the report as tables."""
        for title, rows in {self.name: self.rows, **self.further}.items():
            if rows:
                console.print(_table(title, rows))
        checks = Table(title="checks")
        for key in ("name", "value", "target", "holds"):
            checks.add_column(key, justify="left" if key == "name" else "right", no_wrap=True)
        for check in self.checks:
            promise = f"{'>=' if check.at_least else '<='} {check.target:g}"
            checks.add_row(check.name, _shown(check.value), promise, "yes" if check.holds else "NO")
        console.print(checks)
        for note in self.notes:
            console.print(note, highlight=False)
        machine = self.machine
        console.print(f"{machine['processor']}, {machine['cores']} cores, {machine['ranks']} rank(s)", highlight=False)


def machine_facts() -> dict[str, Any]:
    """Return the properties of the machine and the software that a benchmark depends on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "ranks": MPI.COMM_WORLD.size,
        "system": platform.platform(),
        "python": platform.python_version(),
        "mpi_library": MPI.Get_library_version().split("\0")[0].splitlines()[0].strip(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def interleaved(candidates: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure the candidates in turn, `repeats` times, so that a slow period affects all candidates alike.

    Each call of a candidate runs it once and returns its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            seconds[name].append(candidate())
    return seconds


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title)
    for key, value in rows[0].items():
        table.add_column(key, justify="left" if isinstance(value, str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    return table


def _shown(value: str | int | float) -> str:
    """Return a value as text for a table. NaN marks a value that does not apply."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
