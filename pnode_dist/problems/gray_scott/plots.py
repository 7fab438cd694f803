"""The picture of a Gray-Scott run: a rollout beside the truth, how the model was learnt, and how its error grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pnode_dist.report.panels import MODEL_COLOUR, STYLE, draw_training, save

Array = npt.NDArray[Any]

_SIZE = (12.0, 9.4)
_DPI = 120
_COLUMNS = 6
_SHOWN_SPECIES = 1
_CURVES: dict[str, dict[str, Any]] = {
    "neural ODE": {"color": MODEL_COLOUR, "linewidth": 2.4, "zorder": 3},
    "persistence": {"color": "#5b6770", "linestyle": "--"},
    "training mean": {"color": "#1f78b4", "linestyle": "-."},
}


def draw_report(path: Path, forecast: Path, metrics_file: Path) -> None:
    """Draw `report.png` from the forecast file and the metrics file if there is one. For one rank.

    Maps show v of the first validation trajectory at up to six samples from the first to the last.
    """
    # Only this picture is to look like this, and no display is to be needed.
    with matplotlib.rc_context(STYLE), h5py.File(forecast, "r") as file:
        layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.05, hspace=0.02, wspace=0.02)
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout=layout)
        (maps,), (curves,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.75, 1))
        _draw_maps(maps, file)
        left, right = curves.subplots(1, 2)
        draw_training(left, metrics_file, "")
        _draw_errors(right, file)
        save(figure, path)


def _draw_maps(figure: Any, file: h5py.File) -> None:
    """Truth, rollout and their difference, one below the other, a column for each of some samples."""
    times = file["time"][:]
    shown = np.unique(np.linspace(0, len(times) - 1, _COLUMNS).round().astype(int))
    truth, forecast = (
        file[name][0, :, :, :, _SHOWN_SPECIES][shown].astype(np.float64) for name in ("truth", "forecast")
    )
    error = forecast - truth
    # A few extreme cells must not wash out the rest.
    low, high = np.percentile(truth, [0.5, 99.5])
    largest = max(float(np.percentile(np.abs(error), 99.5)), 1e-12)
    concentration = {"vmin": low, "vmax": high, "cmap": "viridis"}
    difference = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}
    rows = (("Truth", truth, concentration), ("Rollout", forecast, concentration), ("Difference", error, difference))
    extent = (0.0, _length(file, "x"), 0.0, _length(file, "y"))
    grid = GridSpec(len(rows), len(shown), figure=figure)
    axes: list[list[Axes]] = []
    for row, (name, values, colours) in enumerate(rows):
        axes.append([figure.add_subplot(grid[row, column]) for column in range(len(shown))])
        for column, axis in enumerate(axes[-1]):
            image = axis.imshow(values[column], origin="lower", extent=extent, interpolation="nearest", **colours)
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(f"t = {times[shown[column]]:g}", fontsize=10, fontweight="normal", loc="center")
        axes[-1][0].set_ylabel(name, fontsize=11, fontweight="bold")
        if row > 0:
            above = [axis for drawn in axes[:2] for axis in drawn] if row == 1 else axes[row]
            label = "concentration of v" if row == 1 else "rollout less truth"
            figure.colorbar(image, ax=above, extend="both", label=label, aspect=28 if row == 1 else 13, pad=0.01)
    trajectories, _, ny, nx, _ = file["truth"].shape
    figure.suptitle(f"Gray-Scott, {ny} x {nx} points: the first of {trajectories} held-out trajectories", fontsize=12)


def _length(file: h5py.File, axis: str) -> float:
    """The length of the periodic domain along an axis."""
    places = file[axis][:]
    return float(len(places) * places[1])


def _draw_errors(axis: Axes, file: h5py.File) -> None:
    """The root mean square errors of the rollouts and of two simple forecasts at each time."""
    times = file["time"][1:]
    errors = np.array([_squares(file, number) for number in range(file["truth"].shape[0])]).mean(axis=0)
    for (name, style), squares in zip(_CURVES.items(), errors, strict=True):
        axis.plot(times, np.sqrt(squares), label=name, **style)
    axis.set_title("Error on held-out trajectories, both species")
    axis.set_xlabel("time since the initial state")
    axis.set_ylabel("root mean square error")
    axis.set_xlim(0, times[-1])
    # A rollout that blew up must not flatten the other curves.
    model, simple = float(np.sqrt(errors[0].max())), float(np.sqrt(errors[1:].max()))
    axis.set_ylim(0, 1.3 * max(simple, min(model, 2 * simple)))
    axis.grid(alpha=0.25)
    axis.legend(loc="upper center", ncols=len(_CURVES), fontsize=9, handlelength=1.8, columnspacing=1.0)


def _squares(file: h5py.File, trajectory: int) -> Array:
    """The mean squares `[curve, time]` of one trajectory's errors from the first sample after the initial state on."""
    truth, forecast = (file[name][trajectory].astype(np.float64) for name in ("truth", "forecast"))
    candidates = (forecast[1:], truth[:1], file["training_mean"][:])
    return np.stack([((candidate - truth[1:]) ** 2).mean(axis=(1, 2, 3)) for candidate in candidates])
