"""The picture of a graph diffusion run: a rollout beside the truth, the errors, and the conductivity that is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pnode_dist.report.panels import MODEL_COLOUR, STYLE, draw_training, save

Array = npt.NDArray[Any]

_SIZE = (13.5, 11.0)
_DPI = 120
_COLUMNS = 5
_LINEAR_COLOUR = "#1f78b4"
_SUPPORT_COLOUR = "#dedede"
_CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("neural ODE", {"color": MODEL_COLOUR, "linewidth": 2.4, "zorder": 3}),
    "linear": ("linear diffusion, fitted", {"color": _LINEAR_COLOUR, "linestyle": "-."}),
    "persistence": ("persistence", {"color": "#5b6770", "linestyle": "--"}),
}


def draw_report(path: Path, forecast: Path, metrics_file: Path) -> None:
    """Draw `report.png` from the forecast file and the metrics file if there is one. For one rank.

    Maps show the first validation trajectory at up to five samples from the first to the last, closer at the beginning.
    """
    # Only this picture is to look like this, and no display is to be needed.
    with matplotlib.rc_context(STYLE), h5py.File(forecast, "r") as file:
        layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.05, hspace=0.02, wspace=0.02)
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout=layout)
        (maps,), (curves,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.3, 1))
        _draw_maps(maps, file)
        left, middle, right = curves.subplots(1, 3, width_ratios=(1.65, 1, 1))
        draw_training(left, metrics_file, "")
        _draw_errors(middle, file)
        _draw_conductivities(right, file)
        save(figure, path)


def _draw_maps(figure: Any, file: h5py.File) -> None:
    """Truth, rollout and their difference, one below the other, a column for each of some samples."""
    times = file["time"][:]
    last = len(times) - 1
    # Heat spreads ever more slowly.
    shown = np.unique((last * np.linspace(0, 1, _COLUMNS) ** 2).round().astype(int))
    truth, forecast = (file[name][0][shown].astype(np.float64) for name in ("truth", "model"))
    error = forecast - truth
    largest = max(float(np.percentile(np.abs(error), 99.5)), 1e-12)
    temperature = {"vmin": 0.0, "vmax": float(np.percentile(truth, 99.5)), "cmap": "inferno"}
    difference = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}
    rows = (("Truth", truth, temperature), ("Rollout", forecast, temperature), ("Difference", error, difference))
    grid = GridSpec(len(rows), len(shown), figure=figure)
    axes: list[list[Axes]] = []
    for row, (name, values, colours) in enumerate(rows):
        axes.append([figure.add_subplot(grid[row, column]) for column in range(len(shown))])
        for column, axis in enumerate(axes[-1]):
            image = _draw_mesh(axis, file, values[column], **colours)
            if row == 0:
                axis.set_title(f"t = {times[shown[column]]:g}", fontsize=10, fontweight="normal", loc="center")
        axes[-1][0].set_ylabel(name, fontsize=11, fontweight="bold")
        if row > 0:
            above = [axis for drawn in axes[:2] for axis in drawn] if row == 1 else axes[row]
            label = "temperature" if row == 1 else "rollout less truth"
            figure.colorbar(image, ax=above, extend="both", label=label, aspect=28 if row == 1 else 13, pad=0.01)
    trajectories, _, nodes = file["truth"].shape
    edges = file["edge_index"].shape[1] // 2
    figure.suptitle(
        f"Heat on a mesh of {nodes} nodes and {edges} edges: the first of {trajectories} held-out trajectories",
        fontsize=12,
    )


def _draw_mesh(axis: Axes, file: h5py.File, values: Array, **colours: Any) -> Any:
    """The edges as lines, the nodes as dots of the colour of their values."""
    points = np.stack([file["x"][:], file["y"][:]], axis=1)
    source, target = file["edge_index"][:]
    segments = points[np.stack([source, target], axis=1)[source < target]]
    axis.add_collection(LineCollection(list(segments), colors="#9a9a9a", linewidths=0.6, zorder=1))
    size = 7500 / len(points)
    x, y = points.T
    image = axis.scatter(x, y, c=values, s=size, edgecolors="#55555588", linewidths=0.3, zorder=2, **colours)
    axis.set(xticks=[], yticks=[], xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axis.spines[:].set_visible(False)
    return image


def _draw_errors(axis: Axes, file: h5py.File) -> None:
    """The root mean square errors of all rollouts at each time."""
    times = file["time"][1:]
    truth = file["truth"][:].astype(np.float64)
    for name, (label, style) in _CURVES.items():
        error = file[name][:, 1:].astype(np.float64) - truth[:, 1:]
        axis.plot(times, np.sqrt((error**2).mean(axis=(0, 2))), label=label, **style)
    axis.set_title("Error on held-out trajectories")
    axis.set_xlabel("time since the initial state")
    axis.set_ylabel("root mean square error")
    axis.set_xlim(0, times[-1])
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.3)
    axis.grid(alpha=0.25)
    axis.legend(loc="upper right", fontsize=9)


def _draw_conductivities(axis: Axes, file: h5py.File) -> None:
    """The true conductivity, the learnt one and the constant one, and how often each temperature occurs in the data."""
    temperature = file["temperature"][:]
    axis.plot(temperature, file["conductivity_true"][:], color="#2b2b2b", linewidth=1.2, label="truth")
    axis.plot(temperature, file["conductivity_learnt"][:], color=MODEL_COLOUR, linewidth=2.4, label="learnt")
    axis.axhline(file["conductivity_constant"][()], color=_LINEAR_COLOUR, linestyle="-.", label="linear, fitted")
    # Where nothing is known of it, it is not learnt.
    occurring = axis.twinx()
    counts, _, _ = occurring.hist(file["truth"][:].ravel(), bins=temperature, color=_SUPPORT_COLOUR)
    occurring.set_yscale("log")
    occurring.set_ylim(0.5, float(np.max(counts)) ** 2)
    occurring.yaxis.set_visible(False)
    occurring.spines["right"].set_visible(False)
    axis.set_zorder(occurring.get_zorder() + 1)
    axis.patch.set_visible(False)
    axis.plot([], [], color=_SUPPORT_COLOUR, linewidth=7, label="temperatures held out (log)")
    axis.set_title("Conductivity of an edge")
    axis.set_xlabel("temperature of both ends")
    axis.set_xlim(temperature[0], temperature[-1])
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(loc="upper left", fontsize=9)
