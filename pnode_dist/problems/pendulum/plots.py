"""The picture of a pendulum run: rollouts beside the truth, their errors, and how far the constraint drifts."""

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

_SIZE = (13.0, 8.2)
_DPI = 120
_SHOWN = 3
_TRUTH, _VACUUM = "#5b6770", "#1f78b4"
_CURVES: dict[str, dict[str, Any]] = {
    "forecast": {"label": "neural DAE", "color": MODEL_COLOUR, "linewidth": 2.4, "zorder": 3},
    "persistence": {"label": "persistence", "color": "#5b6770", "linestyle": "--"},
    "training_mean": {"label": "training mean", "color": "#33a02c", "linestyle": "-."},
    "vacuum": {"label": "exact without air", "color": _VACUUM, "linestyle": ":", "linewidth": 2},
    "true_force": {"label": "true force, same steps", "color": "#e8a33d"},
}


def draw_report(path: Path, forecast: Path, metrics_file: Path) -> None:
    """Draw `report.png` from the forecast file and the metrics file if there is one. For one rank."""
    # Only this picture is to look like this, and no display is to be needed.
    with matplotlib.rc_context(STYLE), h5py.File(forecast, "r") as file:
        layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, hspace=0.04, wspace=0.03)
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout=layout)
        (above,), (below,) = figure.subfigures(2, 1, squeeze=False)
        position, velocity, tension = above.subplots(1, 3)
        _draw_component(position, file, 0, "Position x (m)")
        _draw_component(velocity, file, 2, "Velocity in x (m/s)")
        _draw_component(tension, file, 4, "Tension for each metre of rod (N/m)")
        training, errors, drift = below.subplots(1, 3, width_ratios=(1.3, 1, 1))
        draw_training(training, metrics_file, "")
        _draw_errors(errors, file)
        _draw_drift(drift, file)
        trajectories = file["truth"].shape[1]
        figure.suptitle(
            f"A pendulum in the wind: {min(_SHOWN, trajectories)} of {trajectories} held-out trajectories", fontsize=12
        )
        save(figure, path)


def _draw_component(axis: Axes, file: h5py.File, component: int, title: str) -> None:
    """One component of some trajectories: the truth as lines, the rollouts as points, the motion without air dotted."""
    times = file["time"][:]
    for trajectory in range(min(_SHOWN, file["truth"].shape[1])):
        first = trajectory == 0
        truth, forecast, vacuum = (file[name][:, trajectory, component] for name in ("truth", "forecast", "vacuum"))
        axis.plot(times, truth, color=_TRUTH, linewidth=1.6, label="truth" if first else None)
        axis.plot(
            times,
            forecast,
            color=MODEL_COLOUR,
            linestyle="none",
            marker="o",
            markersize=3.2,
            label="neural DAE" if first else None,
        )
        if first:
            axis.plot(times, vacuum, color=_VACUUM, linestyle=":", linewidth=1.4, label="without air (one of them)")
    axis.set_title(title)
    axis.set_xlabel("time (s)")
    axis.set_xlim(times[0], times[-1])
    shown = file["truth"][:, :_SHOWN, component]
    margin = 0.12 * float(np.ptp(shown))
    axis.set_ylim(shown.min() - margin, shown.max() + 3 * margin)
    axis.grid(alpha=0.25)
    if component == 0:
        axis.legend(loc="upper right", ncols=3, fontsize=8, handlelength=1.4, columnspacing=0.9)


def _draw_errors(axis: Axes, file: h5py.File) -> None:
    """The root mean square errors, normalised, of the rollouts and of simple forecasts at each time."""
    times, truth, deviation = file["time"][1:], file["truth"][1:], file["scale"][:]
    for name, style in _CURVES.items():
        errors = np.sqrt((((file[name][1:] - truth) / deviation) ** 2).mean(axis=(1, 2)))
        axis.plot(times, errors, **style)
    axis.set_yscale("log")
    axis.set_ylim(top=60)
    axis.set_title("Error on all held-out trajectories")
    axis.set_xlabel("time (s)")
    axis.set_ylabel("root mean square error (normalised)")
    axis.set_xlim(0, times[-1])
    axis.grid(alpha=0.25)
    axis.legend(loc="upper left", ncols=2, fontsize=8, handlelength=1.6, columnspacing=1.0)


def _draw_drift(axis: Axes, file: h5py.File) -> None:
    """How far the rollouts leave the circle that the rod allows, in length and in speed along the rod."""
    times, states = file["time"][1:], file["forecast"][:]
    distance = np.linalg.norm(states[..., :2], axis=-1)
    along = (states[..., :2] * states[..., 2:4]).sum(axis=-1) / distance
    stretch = np.abs(distance / distance[:1] - 1).max(axis=1)[1:]
    floor = np.finfo(np.float64).eps
    axis.plot(times, np.maximum(stretch, floor), color=MODEL_COLOUR, linewidth=2.2, label="change of length, relative")
    axis.plot(
        times, np.maximum(np.abs(along).max(axis=1)[1:], floor), color="#e8a33d", label="speed along the rod (m/s)"
    )
    axis.set_yscale("log")
    axis.set_title("Largest drift of the rollouts")
    axis.set_xlabel("time (s)")
    axis.set_xlim(0, times[-1])
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right", fontsize=9)
