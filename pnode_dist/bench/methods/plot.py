"""Memory and time of every gradient method against steps, in the form of the PNODE paper's figures."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pnode_dist.bench.report import Report, Row

_LINES = {
    "NODE-cont": ("#5b6770", ":", "x"),
    "NODE-naive": ("#a9b4bc", "-", "o"),
    "ANODE": ("#1f78b4", "-", "v"),
    "ACA": ("#6fb1de", "-", "^"),
    "solution": ("#c0392b", "-", "s"),
    "stages": ("#e8a33d", "-", "D"),
    "graph": ("#7d3c98", "-", "P"),
    "spilled": ("#2e8b57", "--", "s"),
    "auto in 50 %": ("#d35480", "--", "*"),
}
_QUANTITIES = {"MiB": "MiB", "ms": "milliseconds"}


def draw_methods(figure: Figure, report: Report) -> None:
    """Draw a column for each solver, and for each experiment a row of panels for memory and one for time."""
    experiments = _different(report.rows, "experiment")
    solvers = _different(report.rows, "solver")
    panels = [(experiment, key) for experiment in experiments for key in _QUANTITIES]
    axes = figure.subplots(len(panels), len(solvers), squeeze=False, sharex=True)
    for line, (experiment, key) in zip(axes, panels, strict=True):
        for axis, solver in zip(line, solvers, strict=True):
            rows = [row for row in report.rows if (row["experiment"], row["solver"]) == (experiment, solver)]
            _draw(axis, rows, key)
            axis.set_title(f"{experiment}, {solver}")
        line[0].set_ylabel(_QUANTITIES[key])
    for axis in axes[-1]:
        axis.set_xlabel("steps in a block")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)


def _draw(axis: Axes, rows: Sequence[Row], key: str) -> None:
    for name, (colour, dashes, marker) in _LINES.items():
        found = [(float(row["steps"]), float(row[key])) for row in rows if row["method"] == name]
        if found:
            steps, values = zip(*found, strict=True)
            axis.plot(steps, values, color=colour, linestyle=dashes, marker=marker, markersize=5, label=name)
    axis.set_xticks(sorted({float(row["steps"]) for row in rows}))
    axis.set_yscale("log")
    axis.grid(alpha=0.25)


def _different(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(str(row[key]) for row in rows))
