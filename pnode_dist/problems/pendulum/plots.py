"""Figure of a pendulum run: rollouts beside the truth, their errors, and the drift of the constraint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from matplotlib.axes import Axes

from pnode_dist.report.panels import (
    CURVE,
    MODEL_COLOUR,
    OTHER_COLOUR,
    PERSISTENCE,
    TRAINING_MEAN,
    draw_errors,
    draw_training,
    draw_trajectories,
    each_lead,
    lead_errors,
    report_figure,
)

_SIZE = (13.0, 8.2)
_SHOWN = 3
_CURVES = {
    "forecast": {"label": "neural DAE", **CURVE},
    "persistence": PERSISTENCE,
    "training_mean": TRAINING_MEAN,
    "vacuum": {"label": "exact without air", "color": OTHER_COLOUR, "linestyle": ":", "linewidth": 2},
    "true_force": {"label": "true force, same steps", "color": "#e8a33d"},
}
_POINTS = {"color": MODEL_COLOUR, "marker": "o", "markersize": 3.2, "label": "neural DAE"}


def draw_report(path: Path, forecast: Path, metrics_file: Path, result: Mapping[str, Any]) -> None:
    """Draw `report.png` from the forecast file and, if it exists, the metrics file. Call on one rank only."""
    with report_figure(path, forecast, _SIZE) as (figure, file):
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


def _draw_component(axis: Axes, file: h5py.File, component: int, title: str) -> None:
    """Draw one component of some trajectories: truth, rollouts, and the motion of the first without air."""
    times = file["time"][:]
    truth, forecast, vacuum = (file[name][:, :_SHOWN, component] for name in ("truth", "forecast", "vacuum"))
    draw_trajectories(axis, times, truth, [(forecast, _POINTS)])
    axis.plot(times, vacuum[:, 0], color=OTHER_COLOUR, linestyle=":", linewidth=1.4, label="without air (one of them)")
    axis.set_title(title)
    axis.set_xlabel("time (s)")
    axis.set_xlim(times[0], times[-1])
    margin = 0.12 * float(np.ptp(truth))
    axis.set_ylim(truth.min() - margin, truth.max() + 3 * margin)
    if component == 0:
        axis.legend(loc="upper right", ncols=3, fontsize=8, handlelength=1.4, columnspacing=0.9)


def _draw_errors(axis: Axes, file: h5py.File) -> None:
    errors = lead_errors(file["truth"], {name: file[name] for name in _CURVES}, axis=0, scale=file["scale"][:])
    draw_errors(axis, file["time"][1:], errors, _CURVES, "root mean square error (normalised)", "time (s)")
    axis.set_yscale("log")
    axis.set_ylim(top=60)
    axis.legend(loc="upper left", ncols=2, fontsize=8, handlelength=1.6, columnspacing=1.0)


def _draw_drift(axis: Axes, file: h5py.File) -> None:
    """Draw the relative change of the rod's length in the rollouts, and their speed along the rod."""
    times, states = file["time"][1:], file["forecast"]
    first, stretch, speed = np.linalg.norm(states[0, :, :2], axis=-1), [], []
    for state in each_lead(states, axis=0):
        distance = np.linalg.norm(state[:, :2], axis=-1)
        stretch.append(np.abs(distance / first - 1).max())
        speed.append(np.abs((state[:, :2] * state[:, 2:4]).sum(axis=-1) / distance).max())
    floor = np.finfo(np.float64).eps
    axis.plot(times, np.maximum(stretch, floor), color=MODEL_COLOUR, linewidth=2.2, label="change of length, relative")
    axis.plot(times, np.maximum(speed, floor), color="#e8a33d", label="speed along the rod (m/s)")
    axis.set_yscale("log")
    axis.set_title("Largest drift of the rollouts")
    axis.set_xlabel("time (s)")
    axis.set_xlim(0, times[-1])
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right", fontsize=9)
