"""Plot of `pnode-dist plan --sweep`: time against memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from pnode_dist.ode.planning import SweepPoint
from pnode_dist.report.panels import MODEL_COLOUR, STYLE
from pnode_dist.system.sizes import format_size

_MEASURED_COLOUR = "#1f78b4"


def draw_sweep(path: Path, points: Sequence[SweepPoint], title: str) -> None:
    """Draw predicted and, if present, measured seconds of a loss and gradient against memory."""
    with mpl.rc_context(STYLE):
        figure, (above, below) = plt.subplots(
            2, 1, figsize=(8, 6.5), sharex=True, layout="constrained", gridspec_kw={"height_ratios": (3, 2)}
        )
        ram = [point.ram for point in points]
        above.plot(ram, [point.plan.seconds for point in points], color=MODEL_COLOUR, marker="o", label="predicted")
        measured = [(point.ram, point.measured) for point in points if point.measured is not None]
        if measured:
            above.plot(*zip(*measured, strict=True), color=_MEASURED_COLOUR, marker="s", label="measured")
        above.set_ylim(bottom=0)
        above.set_xscale("log", base=2)
        above.set_ylabel("seconds for a loss and its gradient")
        above.set_title(title)
        above.legend()
        above.grid(alpha=0.25)
        below.plot(
            ram, [point.plan.recomputed_steps for point in points], color="#555555", marker="o", label="recomputed"
        )
        below.plot(
            ram,
            [point.plan.kept_steps for point in points],
            color="#5aae61",
            marker="^",
            label="recorded in the forward pass",
        )
        below.plot(
            ram,
            [point.plan.disk_writes + point.plan.disk_reads for point in points],
            color="#b8860b",
            marker="v",
            label="checkpoints written to and read from disk",
        )
        below.set_yscale("symlog", linthresh=1)
        below.set_ylabel("steps, checkpoints")
        below.set_xlabel("budget in memory per rank")
        below.legend(fontsize=8)
        below.grid(alpha=0.25)
        below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_size(value)))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)
