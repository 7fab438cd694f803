"""The picture of a Robertson run: rollouts beside the truth over decades of time, their errors, and their steps."""

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
_SHOWN = 4
_TRUTH, _RIVAL = "#5b6770", "#1f78b4"
_POWERS = {"B": -5}
_CURVES: dict[str, dict[str, Any]] = {
    "forecast": {"label": "neural ODE", "color": MODEL_COLOUR, "linewidth": 2.4, "zorder": 3},
    "persistence": {"label": "persistence", "color": "#5b6770", "linestyle": "--"},
    "training_mean": {"label": "training mean", "color": "#33a02c", "linestyle": "-."},
    "rival": {"label": "neural ODE, solved explicitly", "color": _RIVAL, "linestyle": ":", "linewidth": 2, "zorder": 4},
}
_SOLVES: dict[str, tuple[str, dict[str, Any]]] = {
    "steps_as_trained": ("as trained", {"color": MODEL_COLOUR, "linewidth": 2.4}),
    "steps_fine_steps": ("as trained, 16 steps to a sample", {"color": "#e8a33d"}),
    "steps_rival": ("explicit, with error control", {"color": _RIVAL, "linewidth": 2.4}),
}


def draw_report(path: Path, forecast: Path, metrics_file: Path) -> None:
    """Draw `report.png` from the forecast file and the metrics file if there is one. For one rank."""
    # Only this picture is to look like this, and no display is to be needed.
    with matplotlib.rc_context(STYLE), h5py.File(forecast, "r") as file:
        layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, hspace=0.04, wspace=0.03)
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout=layout)
        (above,), (below,) = figure.subfigures(2, 1, squeeze=False)
        for number, axis in enumerate(above.subplots(1, 3)):
            _draw_species(axis, file, number)
        training, errors, steps = below.subplots(1, 3, width_ratios=(1.3, 1, 1))
        draw_training(training, metrics_file, "")
        _draw_errors(errors, file)
        _draw_steps(steps, file)
        trajectories = file["truth"].shape[1]
        figure.suptitle(
            f"Robertson's reactions: {min(_SHOWN, trajectories)} of {trajectories} held-out trajectories, the first "
            "of them from (1, 0, 0)",
            fontsize=12,
        )
        save(figure, path)


def _draw_species(axis: Axes, file: h5py.File, number: int) -> None:
    """One concentration of some trajectories, the truth as lines and the rollouts as points."""
    times = file["time"][:]
    name = file["component"][number].decode()
    power = _POWERS.get(name, 0)
    truth, forecast, rival = (file[data][:, :_SHOWN, number] * 10.0**-power for data in ("truth", "forecast", "rival"))
    for trajectory in range(truth.shape[1]):
        first = trajectory == 0
        axis.plot(times, truth[:, trajectory], color=_TRUTH, linewidth=1.6, label="truth" if first else None)
        axis.plot(
            times,
            forecast[:, trajectory],
            color=MODEL_COLOUR,
            linestyle="none",
            marker="o",
            markersize=3.4,
            label="neural ODE" if first else None,
        )
        axis.plot(
            times,
            rival[:, trajectory],
            color=_RIVAL,
            linestyle="none",
            marker="x",
            markersize=4,
            markeredgewidth=0.9,
            label="the same, solved explicitly" if first else None,
        )
    axis.set_xscale("log")
    axis.set_title(f"Concentration of {name}" + (f" ($10^{{{power}}}$)" if power else ""))
    axis.set_xlabel("time")
    low, high = float(truth.min()), float(truth.max())
    margin = 0.12 * (high - low)
    axis.set_ylim(low - margin, high + 5 * margin)
    axis.grid(alpha=0.25)
    if number == 1:
        axis.legend(loc="upper left", fontsize=9)


def _draw_errors(axis: Axes, file: h5py.File) -> None:
    """The mean absolute errors, scaled, of the rollouts and of simple forecasts at each time."""
    times, truth = file["time"][1:], file["truth"][1:]
    width = file["scale"][:]
    drawn = {name: (np.abs(file[name][1:] - truth) / width).mean(axis=(1, 2)) for name in _CURVES}
    for name, style in _CURVES.items():
        axis.plot(times, drawn[name], **style)
    axis.set_xscale("log")
    axis.set_yscale("log")
    # Room for the legend below; and a rollout that blew up must not flatten the other curves.
    highest = max(float(drawn[name].max()) for name in ("persistence", "training_mean"))
    lowest = min(float(drawn[name].min()) for name in ("forecast", "persistence", "training_mean"))
    axis.set_ylim(max(lowest, 1e-5 * highest) / 20, 3 * highest)
    axis.set_title("Error on all held-out trajectories")
    axis.set_xlabel("time")
    axis.set_ylabel("mean absolute error (scaled)")
    axis.grid(alpha=0.25)
    axis.legend(loc="lower left", fontsize=9)


def _draw_steps(axis: Axes, file: h5py.File) -> None:
    """How many steps each solve of the trained model had taken by each time."""
    times = file["time"][1:]
    for name, (label, style) in _SOLVES.items():
        steps = file[name][1:]
        reached = np.isfinite(steps)
        axis.plot(times[reached], steps[reached], label=label, **style)
        if reached.any():
            axis.annotate(
                f"{int(steps[reached][-1])}",
                (times[reached][-1], steps[reached][-1]),
                textcoords="offset points",
                xytext=(-4, 5),
                ha="right",
                fontsize=9,
                color=style["color"],
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(times[0], times[-1] * 1.6)
    axis.set_ylim(top=30 * max(np.nanmax(file[name][1:]) for name in _SOLVES if np.isfinite(file[name][1:]).any()))
    axis.set_title("Steps taken with the trained model")
    axis.set_xlabel("time")
    axis.grid(alpha=0.25)
    axis.legend(loc="upper left", fontsize=9)
