"""Panels shared by the plots of several problems, their style, and saving a figure to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import h5py
import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pnode_dist.runs import metrics

Array = npt.NDArray[Any]

MODEL_COLOUR, TRUTH_COLOUR, OTHER_COLOUR = "#c1272d", "#5b6770", "#1f78b4"
CURVE: dict[str, Any] = {"color": MODEL_COLOUR, "linewidth": 2.4, "zorder": 3}
"""Style of the model's errors."""
PERSISTENCE: dict[str, Any] = {"label": "persistence", "color": TRUTH_COLOUR, "linestyle": "--"}
TRAINING_MEAN: dict[str, Any] = {"label": "training mean", "color": "#33a02c", "linestyle": "-."}
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
_DPI = 120


@contextmanager
def report_figure(
    path: Path, forecast: Path, size: tuple[float, float], pad: float = 0.06, dpi: int = _DPI
) -> Iterator[tuple[Figure, h5py.File]]:
    """Yield an empty figure of `size` inches and the open forecast file, then write the figure to `path`.

    Call on one rank.
    """
    # Restrict the style to this figure. Drawing must not require a display.
    with matplotlib.rc_context(STYLE), h5py.File(forecast, "r") as file:
        layout = ConstrainedLayoutEngine(w_pad=pad, h_pad=pad, hspace=0.03, wspace=0.03)
        figure = Figure(figsize=size, dpi=dpi, layout=layout)
        yield figure, file
        save(figure, path)


def draw_comparison(
    figure: Any,
    draw_one: Callable[..., Any],
    truth: Array,
    forecast: Array,
    titles: Sequence[str],
    label: str,
    **colours: Any,
) -> None:
    """Draw truth, rollout and their difference, a row each, with a column for each of some samples.

    `draw_one(axis, values, **colours)` draws the values of one sample and returns an object that a colour bar accepts.
    `label` names the quantity. `colours` apply to truth and rollout.
    """
    error = forecast - truth
    # Limit the colour range, so that a few extreme values do not hide the others.
    largest = max(float(np.nanpercentile(np.abs(error), 99.5)), 1e-12)
    difference = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}
    rows = (("Truth", truth, colours), ("Rollout", forecast, colours), ("Difference", error, difference))
    grid = GridSpec(len(rows), len(titles), figure=figure)
    axes = [[figure.add_subplot(grid[row, column]) for column in range(len(titles))] for row in range(len(rows))]
    for row, (name, values, chosen) in enumerate(rows):
        images = [draw_one(axis, shown, **chosen) for axis, shown in zip(axes[row], values, strict=True)]
        axes[row][0].set_ylabel(name, fontsize=11, fontweight="bold")
        if row == 0:
            for axis, title in zip(axes[row], titles, strict=True):
                axis.set_title(title, fontsize=10, fontweight="normal", loc="center")
        else:
            beside = [*axes[0], *axes[1]] if row == 1 else axes[row]
            named, aspect = (label, 28) if row == 1 else ("rollout less truth", 13)
            figure.colorbar(images[-1], ax=beside, extend="both", label=named, aspect=aspect, pad=0.01)


def draw_errors(
    axis: Axes,
    times: Array,
    errors: Mapping[str, Array],
    curves: Mapping[str, Mapping[str, Any]],
    error: str = "root mean square error",
    time: str = "time since the initial state",
) -> None:
    """Draw the errors of some forecasts over time, each in the style of its curve. `error` and `time` name the axes."""
    for name, style in curves.items():
        axis.plot(times, errors[name], **style)
    axis.set_title("Error on all held-out trajectories")
    axis.set_xlabel(time)
    axis.set_ylabel(error)
    axis.set_xlim(0, times[-1])
    axis.grid(alpha=0.25)


def draw_trajectories(
    axis: Axes, times: Array, truth: Array, points: Sequence[tuple[Array, Mapping[str, Any]]]
) -> None:
    """Draw some trajectories `[time, trajectory]`, the truth as lines and forecasts as points in their styles."""
    for trajectory in range(truth.shape[1]):
        label = "truth" if trajectory == 0 else None
        axis.plot(times, truth[:, trajectory], color=TRUTH_COLOUR, linewidth=1.6, label=label)
        for values, style in points:
            named = style if trajectory == 0 else {**style, "label": None}
            axis.plot(times, values[:, trajectory], linestyle="none", **named)
    axis.grid(alpha=0.25)


def root_mean_squares(errors: Array, axes: tuple[int, ...]) -> Array:
    """Return the root mean squares of errors over some axes, in float64."""
    found: Array = np.sqrt((errors.astype(np.float64) ** 2).mean(axis=axes))
    return found


def each_lead(data: h5py.Dataset, axis: int = 1) -> Iterator[Array]:
    """Yield the values at the leads 1, 2, ... along an axis of a variable in float64, read one after the other."""
    for lead in range(1, data.shape[axis]):
        yield np.asarray(data[(slice(None),) * axis + (lead,)], dtype=np.float64)


def lead_errors(
    truth: h5py.Dataset, forecasts: Mapping[str, h5py.Dataset | Array], axis: int = 1, scale: Any = 1.0, power: int = 2
) -> dict[str, Array]:
    """Return the mean errors `[lead]` of forecasts in units of `scale`: root mean square, or absolute for power 1.

    `axis` is that of leads. A forecast is a variable of the file, or the same values at all leads. Reads lead by lead.
    """
    found: dict[str, Array] = {}
    for name, forecast in forecasts.items():
        given = each_lead(forecast, axis) if isinstance(forecast, h5py.Dataset) else repeat(forecast)
        means = [np.mean(np.abs((a - b) / scale) ** power) for a, b in zip(given, each_lead(truth, axis), strict=False)]
        found[name] = np.array(means) ** (1 / power)
    return found


def draw_minimisation(axis: Axes, metrics_file: Path) -> None:
    """Draw J and the norm of its gradient after each iteration of an inversion."""
    records = list(metrics.read(metrics_file)) if metrics_file.exists() else []
    steps = [record for record in records if record["kind"] == "iteration"]
    axis.set_title("Minimisation")
    if not steps:
        axis.text(0.5, 0.5, "no metrics file", ha="center", transform=axis.transAxes)
        return
    numbers, values, norms = (
        np.array([step[key] for step in steps], dtype=float) for key in ("iteration", "value", "gradient_norm")
    )
    axis.semilogy(numbers, values, color=MODEL_COLOUR, linewidth=2.2, label="J")
    axis.semilogy(numbers, norms, color=OTHER_COLOUR, linewidth=1.4, label="norm of the gradient")
    axis.set_xlabel("iteration")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9)


def draw_training(
    axis: Axes,
    metrics_file: Path,
    units: str,
    loss: str = "loss (normalised)",
    error: str = "validation error, all leads",
) -> None:
    """Draw the training loss of each step, its mean over each epoch, and the validation error if it was computed.

    `loss` and `error` are the labels of the two quantities.
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
