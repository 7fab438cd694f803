"""Figure of a graph diffusion run: a rollout beside the truth, the errors, and the learnt conductivity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from pnode_dist.report.panels import (
    CURVE,
    MODEL_COLOUR,
    OTHER_COLOUR,
    PERSISTENCE,
    draw_comparison,
    draw_errors,
    draw_training,
    each_lead,
    lead_errors,
    report_figure,
)

_SIZE = (13.5, 11.0)
_COLUMNS = 5
_SUPPORT_COLOUR = "#dedede"
_CURVES: dict[str, dict[str, Any]] = {
    "model": {"label": "neural ODE", **CURVE},
    "linear": {"label": "linear diffusion, fitted", "color": OTHER_COLOUR, "linestyle": "-."},
    "persistence": PERSISTENCE,
}


def draw_report(path: Path, forecast: Path, metrics_file: Path, result: Mapping[str, Any]) -> None:
    """Draw `report.png` from the forecast file and, if it exists, the metrics file. Call on one rank only.

    Maps show the first validation trajectory at up to five samples from the first to the last, denser at the start.
    """
    with report_figure(path, forecast, _SIZE, pad=0.04) as (figure, file):
        (maps,), (curves,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.3, 1))
        _draw_maps(maps, file)
        left, middle, right = curves.subplots(1, 3, width_ratios=(1.65, 1, 1))
        draw_training(left, metrics_file, "")
        _draw_errors(middle, file)
        _draw_conductivities(right, file)


def _draw_maps(figure: Any, file: h5py.File) -> None:
    times = file["time"][:]
    # The spread of heat slows down with time, so show more early samples.
    shown = np.unique(((len(times) - 1) * np.linspace(0, 1, _COLUMNS) ** 2).round().astype(int))
    truth, forecast = (file[name][0, shown].astype(np.float64) for name in ("truth", "model"))
    highest = float(np.percentile(truth, 99.5))
    titles = [f"t = {times[number]:g}" for number in shown]

    def draw_one(axis: Axes, values: Any, **colours: Any) -> Any:
        return _draw_mesh(axis, file, values, **colours)

    draw_comparison(figure, draw_one, truth, forecast, titles, "temperature", vmin=0.0, vmax=highest, cmap="inferno")
    trajectories, _, nodes = file["truth"].shape
    edges = file["edge_index"].shape[1] // 2
    figure.suptitle(
        f"Heat on a mesh of {nodes} nodes and {edges} edges: the first of {trajectories} held-out trajectories",
        fontsize=12,
    )


def _draw_mesh(axis: Axes, file: h5py.File, values: Any, **colours: Any) -> Any:
    """Draw the edges as lines and the nodes as dots coloured by value."""
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
    """Draw the root mean square errors of all rollouts against time."""
    errors = lead_errors(file["truth"], {name: file[name] for name in _CURVES})
    draw_errors(axis, file["time"][1:], errors, _CURVES)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.3)
    axis.legend(loc="upper right", fontsize=9)


def _draw_conductivities(axis: Axes, file: h5py.File) -> None:
    """Draw the true, the learnt and the constant conductivity, and a histogram of the held-out temperatures."""
    temperature = file["temperature"][:]
    axis.plot(temperature, file["conductivity_true"][:], color="#2b2b2b", linewidth=1.2, label="truth")
    axis.plot(temperature, file["conductivity_learnt"][:], color=MODEL_COLOUR, linewidth=2.4, label="learnt")
    axis.axhline(file["conductivity_constant"][()], color=OTHER_COLOUR, linestyle="-.", label="linear, fitted")
    # The conductivity is learnt only at temperatures that occur, so draw their histogram behind it.
    occurring = axis.twinx()
    truth = file["truth"]
    found = [np.histogram(values, temperature)[0] for values in (truth[:, 0], *each_lead(truth))]
    counts, _, _ = occurring.hist(temperature[:-1], temperature, weights=np.sum(found, axis=0), color=_SUPPORT_COLOUR)
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
