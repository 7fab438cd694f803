"""Figure of a Gray-Scott run: a rollout beside the truth, the training curves, and the growth of the error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from matplotlib.axes import Axes

from pnode_dist.report.panels import (
    CURVE,
    PERSISTENCE,
    TRAINING_MEAN,
    draw_comparison,
    draw_errors,
    draw_training,
    lead_errors,
    report_figure,
)

_SIZE = (12.0, 9.4)
_COLUMNS = 6
_SHOWN_SPECIES = 1
_CURVES = {"forecast": {"label": "neural ODE", **CURVE}, "persistence": PERSISTENCE, "training_mean": TRAINING_MEAN}


def draw_report(path: Path, forecast: Path, metrics_file: Path, result: Mapping[str, Any]) -> None:
    """Draw `report.png` from the forecast file and, if it exists, the metrics file. Call on one rank only.

    Maps show v of the first validation trajectory at up to six samples from the first to the last.
    """
    with report_figure(path, forecast, _SIZE, pad=0.04) as (figure, file):
        (maps,), (curves,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.75, 1))
        _draw_maps(maps, file)
        left, right = curves.subplots(1, 2)
        draw_training(left, metrics_file, "")
        _draw_errors(right, file)


def _draw_maps(figure: Any, file: h5py.File) -> None:
    times = file["time"][:]
    shown = np.unique(np.linspace(0, len(times) - 1, _COLUMNS).round().astype(int))
    truth, forecast = (file[name][0, shown, :, :, _SHOWN_SPECIES].astype(np.float64) for name in ("truth", "forecast"))
    # The domain is periodic: it ends one spacing after the last point.
    extent = (0.0, len(file["x"]) * file["x"][1], 0.0, len(file["y"]) * file["y"][1])

    def draw_one(axis: Axes, values: Any, **colours: Any) -> Any:
        axis.set(xticks=[], yticks=[])
        return axis.imshow(values, origin="lower", extent=extent, interpolation="nearest", **colours)

    low, high = np.percentile(truth, [0.5, 99.5])
    titles = [f"t = {times[number]:g}" for number in shown]
    draw_comparison(
        figure, draw_one, truth, forecast, titles, "concentration of v", vmin=low, vmax=high, cmap="viridis"
    )
    trajectories, _, ny, nx, _ = file["truth"].shape
    figure.suptitle(f"Gray-Scott, {ny} x {nx} points: the first of {trajectories} held-out trajectories", fontsize=12)


def _draw_errors(axis: Axes, file: h5py.File) -> None:
    truth = file["truth"]
    candidates = {
        "forecast": file["forecast"],
        "persistence": truth[:, 0].astype(np.float64),
        "training_mean": file["training_mean"][:],
    }
    errors = lead_errors(truth, candidates)
    draw_errors(axis, file["time"][1:], errors, _CURVES)
    # Limit the axis, so that a diverged rollout does not flatten the other curves.
    simple = max(float(errors[name].max()) for name in ("persistence", "training_mean"))
    axis.set_ylim(0, 1.3 * max(simple, min(float(errors["forecast"].max()), 2 * simple)))
    axis.legend(loc="upper center", ncols=len(_CURVES), fontsize=9, handlelength=1.8, columnspacing=1.0)
