"""Plot of a flow: its samples beside the data, the learnt density, and the quality of the fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from pnode_dist.report.panels import MODEL_COLOUR, OTHER_COLOUR, TRUTH_COLOUR, report_figure
from pnode_dist.runs import metrics

_SIZE = (13.0, 7.6)
_MODELS: dict[str, tuple[str, str]] = {
    "flow": ("flow", MODEL_COLOUR),
    "fitted_normal": ("fitted normal distribution", TRUTH_COLOUR),
    "truth": ("true density", "#33a02c"),
}
_SHOWN = 2000
_PAIRS = 4


def draw_report(path: Path, forecast: Path, metrics_file: Path, result: Mapping[str, Any]) -> None:
    """Draw `report.png` from the forecast file, evaluate's table and the metrics file if present. Call on one rank."""
    with report_figure(path, forecast, _SIZE) as (figure, file):
        (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.1, 1))
        if "log_density" in file:
            _draw_plane(above, file)
        else:
            _draw_pairs(above, file)
        training, fit, spread = below.subplots(1, 3)
        _draw_training(training, metrics_file)
        _draw_fit(fit, file)
        if "paths" in file:
            _draw_paths(spread, file)
        else:
            _draw_histograms(spread, file)
        figure.suptitle(_title(result), fontsize=12)


def _title(result: Mapping[str, Any]) -> str:
    found = ", ".join(f"{_MODELS[row['of']][0]} {row['nats']:.3f}" for row in result["log_likelihood"])
    name = result["density"].replace("_", " ")
    return f"{name} ({result['dimension']} dimensions): mean log-likelihood of test rows in nats: {found}"


def _draw_plane(figure: SubFigure, file: h5py.File) -> None:
    """Draw test rows, samples, and maps of the learnt and, if known, of the true density."""
    x, y = file["x"][:], file["y"][:]
    extent = (1.5 * x[0] - 0.5 * x[1], 1.5 * x[-1] - 0.5 * x[-2], 1.5 * y[0] - 0.5 * y[1], 1.5 * y[-1] - 0.5 * y[-2])
    maps = {"log_density": "Density of the flow", "true_log_density": "True density"}
    present = {name: np.exp(file[name][:]) for name in maps if name in file}
    axes = figure.subplots(1, 2 + len(present))
    for axis, (name, title, colour) in zip(
        axes[:2], (("test", "Test rows", OTHER_COLOUR), ("samples", "Samples of the flow", MODEL_COLOUR)), strict=True
    ):
        axis.scatter(*file[name][:_SHOWN].T, s=3, color=colour, alpha=0.5, linewidths=0)
        axis.set_title(title)
    highest = max(float(values.max()) for values in present.values())
    for axis, (name, values) in zip(axes[2:], present.items(), strict=True):
        image = axis.imshow(values, origin="lower", extent=extent, cmap="magma", vmin=0, vmax=highest)
        axis.set_title(maps[name])
    figure.colorbar(image, ax=axes[-1], shrink=0.75, pad=0.02)
    for axis in axes:
        axis.set_xlim(extent[:2])
        axis.set_ylim(extent[2:])
        axis.set_aspect("equal")


def _draw_pairs(figure: SubFigure, file: h5py.File) -> None:
    """Draw test rows beside samples for some pairs of columns."""
    test, samples = file["test"][:_SHOWN], file["samples"][:_SHOWN]
    columns = test.shape[1]
    pairs = [(first, (first + 1) % columns) for first in range(0, columns, 2)][:_PAIRS]
    for axis, (first, second) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        size = 4 if len(test) > 300 else 12
        axis.scatter(samples[:, first], samples[:, second], s=5, color=MODEL_COLOUR, alpha=0.5, linewidths=0)
        axis.scatter(test[:, first], test[:, second], s=size, color=OTHER_COLOUR, alpha=0.6, linewidths=0)
        # Limit the range, so that a few far samples do not hide the others.
        both = np.concatenate([test[:, (first, second)], samples[:, (first, second)]])
        low, high = np.percentile(both, [0.3, 99.7], axis=0)
        margin = 0.12 * (high - low)
        axis.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axis.set_ylim(low[1] - margin[1], high[1] + margin[1])
        axis.set_xlabel(f"column {first + 1}")
        axis.set_ylabel(f"column {second + 1}")
        axis.grid(alpha=0.25)
    figure.suptitle("Test rows (blue) and samples of the flow (red)", fontsize=11, fontweight="bold")


def _draw_training(axis: Axes, metrics_file: Path) -> None:
    """Draw the training loss of each step, which may be negative, and the validation rows' negative log-likelihood."""
    records = list(metrics.read(metrics_file)) if metrics_file.exists() else []
    steps = [record for record in records if record["kind"] == "step" and record["loss"] is not None]
    axis.set_title("Training")
    if not steps:
        axis.text(0.5, 0.5, "no metrics file", ha="center", transform=axis.transAxes)
        return
    numbers, losses = (np.array([record[key] for record in steps]) for key in ("step", "loss"))
    axis.plot(numbers, losses, color=MODEL_COLOUR, alpha=0.4, linewidth=1, label="loss of a batch")
    checks = [record for record in records if record["kind"] == "validation" and record["figures"]]
    figures = [next(iter(record["figures"].values())) for record in checks]
    axis.plot(
        [record["step"] for record in checks],
        figures,
        color=OTHER_COLOUR,
        linewidth=2,
        marker="^",
        markersize=4,
        label="validation rows",
    )
    # Losses of the first steps are far larger and would hide the later ones.
    low, high = np.percentile(np.concatenate([losses, figures]), [0, 97])
    axis.set_ylim(low - 0.06 * (high - low), high + 0.15 * (high - low))
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("negative log-likelihood (nats)")
    axis.grid(alpha=0.25)
    axis.legend(loc="upper right", fontsize=9)


def _draw_fit(axis: Axes, file: h5py.File) -> None:
    """Draw the flow's log density of each test row against the true one, or that of the fitted normal distribution."""
    name = "truth" if "test_log_density_truth" in file else "fitted_normal"
    across, learnt = file[f"test_log_density_{name}"][:], file["test_log_density_flow"][:]
    axis.scatter(across, learnt, s=6, color=MODEL_COLOUR, alpha=0.4, linewidths=0)
    both = np.concatenate([across, learnt])
    low, high = np.percentile(both, [0.5, 100])
    ends = (low - 0.05 * (high - low), high + 0.05 * (high - low))
    axis.plot(ends, ends, color="#2b2b2b", linewidth=1, linestyle="--", label="equal")
    axis.set_xlim(ends)
    axis.set_ylim(ends)
    axis.set_title("Log density of each test row (nats)")
    axis.set_xlabel(_MODELS[name][0])
    axis.set_ylabel("flow")
    axis.grid(alpha=0.25)
    axis.legend(loc="upper left", fontsize=9)


def _draw_paths(axis: Axes, file: h5py.File) -> None:
    """Draw the paths from noise to samples."""
    paths = file["paths"][:]
    axis.plot(*np.moveaxis(paths, -1, 0), color=TRUTH_COLOUR, linewidth=0.8, alpha=0.7)
    for points, colour, label in ((paths[0], TRUTH_COLOUR, "noise"), (paths[-1], MODEL_COLOUR, "samples")):
        axis.scatter(points[:, 0], points[:, 1], s=12, color=colour, zorder=3, label=label)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_title("From noise to samples")
    axis.legend(loc="upper right", fontsize=9)


def _draw_histograms(axis: Axes, file: h5py.File) -> None:
    """Draw the distributions of the log densities of test rows and of samples."""
    test, samples = file["test_log_density_flow"][:], file["sample_log_density"][:]
    low, high = np.percentile(np.concatenate([test, samples]), [0.5, 100])
    bins = np.linspace(low, high + 0.02 * (high - low), 40)
    for values, label, colour in ((test, "test rows", OTHER_COLOUR), (samples, "samples", MODEL_COLOUR)):
        axis.hist(
            np.maximum(values, low),
            bins=list(bins),
            density=True,
            histtype="step",
            color=colour,
            label=label,
            linewidth=2,
        )
    axis.set_title("Log density by the flow (nats)")
    axis.set_ylabel("share for each nat")
    axis.grid(alpha=0.25)
    axis.legend(loc="upper left", fontsize=9)
