"""The picture of a run on a line: a rollout beside the truth in space and time, and how its error grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pnode_dist.report.panels import MODEL_COLOUR, STYLE, draw_training, save

Array = npt.NDArray[Any]

_SIZE = (12.0, 9.4)
_DPI = 120
_CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("neural ODE", {"color": MODEL_COLOUR, "linewidth": 2.4, "zorder": 3}),
    "explicit": ("the same, explicit", {"color": "#e6a11a", "linestyle": ":", "linewidth": 2.4, "zorder": 4}),
    "equation": ("true equation, same steps", {"color": "#1f78b4", "linestyle": "-."}),
    "persistence": ("persistence", {"color": "#5b6770", "linestyle": "--"}),
}


def draw_report(path: Path, forecast: Path, metrics_file: Path, title: str) -> None:
    """Draw `report.png` from the forecast file and the metrics file if there is one. For one rank.

    Maps over x and time show the first validation trajectory; `title` names the equation.
    """
    # Only this picture is to look like this, and no display is to be needed.
    with matplotlib.rc_context(STYLE), h5py.File(forecast, "r") as file:
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
        (maps,), (curves,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.5, 1))
        trajectories, _, points = file["truth"].shape
        maps.suptitle(f"{title}, {points} points: the first of {trajectories} held-out trajectories", fontsize=12)
        _draw_maps(maps, file)
        left, right = curves.subplots(1, 2)
        draw_training(left, metrics_file, "")
        _draw_errors(right, file)
        save(figure, path)


def _draw_maps(figure: Any, file: h5py.File) -> None:
    """Truth, rollout and their difference, side by side, time upwards."""
    truth, rollout = (file[name][0].astype(np.float64) for name in ("truth", "model"))
    largest = float(np.abs(truth).max()) or 1.0
    # A rollout that blew up is shown at the end of the scale.
    difference = np.nan_to_num(rollout - truth, nan=2 * largest, posinf=2 * largest, neginf=-2 * largest)
    x, time = file["x"][:], file["time"][:]
    extent = (0.0, len(x) * x[1], time[0], time[-1])
    axes = figure.subplots(1, 3, sharey=True)
    for axis, name, values in zip(
        axes, ("Truth", "Rollout", "Rollout less truth"), (truth, rollout, difference), strict=True
    ):
        image = axis.imshow(
            values,
            origin="lower",
            extent=extent,
            aspect="auto",
            interpolation="nearest",
            vmin=-largest,
            vmax=largest,
            cmap="RdBu_r",
        )
        axis.set_title(name)
        axis.set_xlabel("x")
    axes[0].set_ylabel("time")
    figure.colorbar(image, ax=axes, extend="both", label="u", aspect=28, pad=0.01)


def _draw_errors(axis: Axes, file: h5py.File) -> None:
    """The root mean square errors of all rollouts at each time."""
    times = file["time"][1:]
    truth = file["truth"][:].astype(np.float64)
    curves = {}
    for name, (label, style) in _CURVES.items():
        error = file[name][:, 1:].astype(np.float64) - truth[:, 1:]
        curves[name] = np.sqrt((error**2).mean(axis=(0, 2)))
        axis.plot(times, curves[name], label=label, **style)
    axis.set_title("Error on held-out trajectories")
    axis.set_xlabel("time since the first sample")
    axis.set_ylabel("root mean square error")
    axis.set_xlim(0, times[-1])
    axis.set_yscale("log")
    # A rollout that blew up, or one without any error, must not flatten the other curves.
    highest = 3 * float(curves["persistence"].max())
    errors = np.concatenate(list(curves.values()))
    lowest = float(errors[np.isfinite(errors)].min())
    axis.set_ylim(max(lowest / 2, 1e-7 * highest), highest)
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right", fontsize=9)
