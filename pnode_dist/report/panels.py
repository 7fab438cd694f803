"""What the pictures of all problems share: their style, how the model was learnt, and how they become a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pnode_dist.runs import metrics

MODEL_COLOUR = "#c1272d"
_INK = "#2b2b2b"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#777777",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_LOGARITHMIC = 20


def draw_training(
    axis: Axes,
    metrics_file: Path,
    units: str,
    loss: str = "loss (normalised)",
    error: str = "validation error, all leads",
) -> None:
    """The training loss of each step and its mean over each epoch, and the validation error if it was computed.

    `loss` and `error` say what they are.
    """
    records = list(metrics.read(metrics_file)) if metrics_file.exists() else []
    steps = [record for record in records if record["kind"] == "step" and record["loss"] is not None]
    axis.set_title("Training")
    if not steps:
        axis.text(0.5, 0.5, "no metrics file", ha="center", transform=axis.transAxes)
        return
    numbers, losses = (np.array([record[key] for record in steps]) for key in ("step", "loss"))
    epochs = np.array([record["epoch"] for record in steps])
    axis.plot(numbers, losses, color=MODEL_COLOUR, alpha=0.3, linewidth=1, label="loss of a batch")
    means = [(numbers[epochs == epoch].max(), losses[epochs == epoch].mean()) for epoch in np.unique(epochs)]
    axis.plot(
        *zip(*means, strict=True), color=MODEL_COLOUR, linewidth=2.2, marker="o", markersize=4, label="epoch mean"
    )
    if losses.max() > _LOGARITHMIC * losses.min():
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1.25 * losses.max())
    axis.set_xlabel("optimiser step")
    axis.set_ylabel(loss)
    axis.grid(alpha=0.25)
    lines, labels = axis.get_legend_handles_labels()
    checks = [record for record in records if record["kind"] == "validation" and record["figures"]]
    if len(checks) > 1:
        other = axis.twinx()
        figures = [next(iter(record["figures"].values())) for record in checks]
        (line,) = other.plot([record["step"] for record in checks], figures, color="#1f78b4", marker="^", markersize=5)
        if max(figures) > _LOGARITHMIC * min(figures):
            other.set_yscale("log")
            other.set_ylim(top=max(figures) * (max(figures) / min(figures)) ** 0.25)
        else:
            other.set_ylim(0, 1.35 * max(figures))
        name = error.partition(",")[0]
        other.set_ylabel(f"{name} ({units})" if units else name)
        other.spines["right"].set_visible(True)
        lines, labels = [*lines, line], [*labels, error]
    axis.legend(lines, labels, loc="upper center", ncols=len(lines), fontsize=9, handlelength=1.4, columnspacing=1.0)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file in its own resolution; `Figure.savefig` would draw it twice."""
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]
