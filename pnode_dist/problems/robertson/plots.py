"""Figure of a Robertson run: rollouts beside the truth over decades of time, their errors, and their steps."""

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
    lead_errors,
    report_figure,
)

_SIZE = (13.0, 8.2)
_SHOWN = 4
_POWERS = {"B": -5}
_CURVES: dict[str, dict[str, Any]] = {
    "forecast": {"label": "neural ODE", **CURVE},
    "persistence": PERSISTENCE,
    "training_mean": TRAINING_MEAN,
    "rival": {
        "label": "neural ODE, solved explicitly",
        "color": OTHER_COLOUR,
        "linestyle": ":",
        "linewidth": 2,
        "zorder": 4,
    },
}
_POINTS: dict[str, dict[str, Any]] = {
    "forecast": {"color": MODEL_COLOUR, "marker": "o", "markersize": 3.4, "label": "neural ODE"},
    "rival": {
        "color": OTHER_COLOUR,
        "marker": "x",
        "markersize": 4,
        "markeredgewidth": 0.9,
        "label": "the same, solved explicitly",
    },
}
_SOLVES: dict[str, tuple[str, dict[str, Any]]] = {
    "steps_as_trained": ("as trained", {"color": MODEL_COLOUR, "linewidth": 2.4}),
    "steps_fine_steps": ("as trained, 16 steps to a sample", {"color": "#e8a33d"}),
    "steps_rival": ("explicit, with error control", {"color": OTHER_COLOUR, "linewidth": 2.4}),
}


def draw_report(path: Path, forecast: Path, metrics_file: Path, result: Mapping[str, Any]) -> None:
    """Draw `report.png` from the forecast file and, if it exists, the metrics file. Call on one rank only."""
    with report_figure(path, forecast, _SIZE) as (figure, file):
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


def _draw_species(axis: Axes, file: h5py.File, number: int) -> None:
    """Draw one concentration of some trajectories, with the truth as lines and the rollouts as points."""
    name = file["component"][number].decode()
    power = _POWERS.get(name, 0)
    truth, *found = (file[data][:, :_SHOWN, number] * 10.0**-power for data in ("truth", *_POINTS))
    draw_trajectories(axis, file["time"][:], truth, list(zip(found, _POINTS.values(), strict=True)))
    axis.set_xscale("log")
    axis.set_title(f"Concentration of {name}" + (f" ($10^{{{power}}}$)" if power else ""))
    axis.set_xlabel("time")
    low, high = float(truth.min()), float(truth.max())
    margin = 0.12 * (high - low)
    axis.set_ylim(low - margin, high + 5 * margin)
    if number == 1:
        axis.legend(loc="upper left", fontsize=9)


def _draw_errors(axis: Axes, file: h5py.File) -> None:
    """Draw the mean absolute scaled errors of the rollouts and of simple forecasts against time."""
    forecasts = {name: file[name] for name in _CURVES}
    errors = lead_errors(file["truth"], forecasts, axis=0, scale=file["scale"][:], power=1)
    times = file["time"][1:]
    draw_errors(axis, times, errors, _CURVES, "mean absolute error (scaled)", "time")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(times[0] / 2, times[-1] * 2)
    # Leave room for the legend below, and do not let a diverged rollout flatten the other curves.
    highest = max(float(errors[name].max()) for name in ("persistence", "training_mean"))
    lowest = min(float(errors[name].min()) for name in ("forecast", "persistence", "training_mean"))
    axis.set_ylim(max(lowest, 1e-5 * highest) / 20, 3 * highest)
    axis.legend(loc="lower left", fontsize=9)


def _draw_steps(axis: Axes, file: h5py.File) -> None:
    """Draw the cumulative steps of each solve of the trained model against time."""
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
