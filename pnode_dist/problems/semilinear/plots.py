"""Figure of a run on a line: a rollout beside the truth in space and time, and the growth of its error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from matplotlib.axes import Axes

from pnode_dist.report.panels import (
    CURVE,
    OTHER_COLOUR,
    PERSISTENCE,
    draw_errors,
    draw_training,
    lead_errors,
    report_figure,
)

_SIZE = (12.0, 9.4)
_MOST_ROWS = 2000
_CURVES: dict[str, dict[str, Any]] = {
    "model": {"label": "neural ODE", **CURVE},
    "explicit": {"label": "the same, explicit", "color": "#e6a11a", "linestyle": ":", "linewidth": 2.4, "zorder": 4},
    "equation": {"label": "true equation, same steps", "color": OTHER_COLOUR, "linestyle": "-."},
    "persistence": PERSISTENCE,
}


def draw_report(path: Path, forecast: Path, metrics_file: Path, result: Mapping[str, Any]) -> None:
    """Draw `report.png` from the forecast file and, if it exists, the metrics file. Call on one rank only.

    Maps over x and time show the first validation trajectory.
    """
    with report_figure(path, forecast, _SIZE) as (figure, file):
        (maps,), (curves,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.5, 1))
        trajectories, _, points = file["truth"].shape
        title = f"{result['equation']}, {points} points: the first of {trajectories} held-out trajectories"
        maps.suptitle(title, fontsize=12)
        _draw_maps(maps, file)
        left, right = curves.subplots(1, 2)
        draw_training(left, metrics_file, "")
        _draw_errors(right, file)


def _draw_maps(figure: Any, file: h5py.File) -> None:
    """Draw truth, rollout and their difference side by side, with time upwards."""
    # More rows than the picture has are not seen.
    every = math.ceil(file["truth"].shape[1] / _MOST_ROWS)
    truth, rollout = (file[name][0, ::every].astype(np.float64) for name in ("truth", "model"))
    largest = float(np.abs(truth).max()) or 1.0
    # Show a diverged rollout at the end of the scale.
    difference = np.nan_to_num(rollout - truth, nan=2 * largest, posinf=2 * largest, neginf=-2 * largest)
    x, time = file["x"][:], file["time"][::every]
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
    """Draw the root mean square errors of all rollouts against time."""
    errors = lead_errors(file["truth"], {name: file[name] for name in _CURVES})
    draw_errors(axis, file["time"][1:], errors, _CURVES, time="time since the first sample")
    axis.set_yscale("log")
    # Limit the axis, so that a diverged or an exact rollout does not flatten the other curves.
    highest = 3 * float(errors["persistence"].max())
    every = np.concatenate(list(errors.values()))
    axis.set_ylim(max(float(every[np.isfinite(every)].min()) / 2, 1e-7 * highest), highest)
    axis.legend(loc="lower right", fontsize=9)
