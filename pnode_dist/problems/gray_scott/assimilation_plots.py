"""Figure of an assimilation: truth, first guess, analysis and error, the minimisation, and the errors over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from pnode_dist.report.panels import (
    CURVE,
    OTHER_COLOUR,
    PERSISTENCE,
    draw_minimisation,
    report_figure,
    root_mean_squares,
)

_SIZE = (12.0, 9.8)
_SHOWN_SPECIES = 1
_FIRST_GUESS: dict[str, Any] = {**PERSISTENCE, "label": "first guess"}


def draw_assimilation(path: Path, analysis: Path, metrics_file: Path) -> None:
    """Draw `report.png` from the file of an analysis and the metrics of its inversion. Call on one rank only.

    Maps show v at the first time, at the last observed one and at the last one.
    """
    with report_figure(path, analysis, _SIZE, pad=0.04) as (figure, file):
        (maps,), (curves,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.6, 1))
        _draw_maps(maps, file)
        left, right = curves.subplots(1, 2)
        draw_minimisation(left, metrics_file)
        _draw_errors(right, file)


def _draw_maps(figure: SubFigure, file: h5py.File) -> None:
    times, last = file["time"][:], int(file.attrs["last_observed"])
    shown = list(dict.fromkeys((0, last, len(times) - 1)))
    v = {name: file[name][..., _SHOWN_SPECIES].astype(np.float64) for name in ("truth", "first_guess", "analysis")}
    error = v["analysis"] - v["truth"]
    low, high = np.percentile(v["truth"][shown], [0.5, 99.5])
    # Limit the colour range, so that a few extreme values do not hide the others.
    largest = max(float(np.percentile(np.abs(error[shown]), 99.5)), 1e-12)
    field, difference = {"vmin": low, "vmax": high, "cmap": "viridis"}, {"vmin": -largest, "vmax": largest}
    columns = (
        ("Truth", v["truth"], field),
        ("First guess", v["first_guess"], field),
        ("Analysis", v["analysis"], field),
        ("Error", error, {**difference, "cmap": "RdBu_r"}),
    )
    axes = figure.subplots(len(shown), len(columns), squeeze=False)
    y, x = (file[name][:] for name in ("y", "x"))
    # The domain is periodic: it ends one spacing after the last point.
    extent = (0.0, len(x) * x[1], 0.0, len(y) * y[1])
    for row, number in zip(axes, shown, strict=True):
        images = []
        for axis, (name, values, colours) in zip(row, columns, strict=True):
            images.append(
                axis.imshow(values[number], origin="lower", extent=extent, interpolation="nearest", **colours)
            )
            axis.set(xticks=[], yticks=[])
            if number == shown[0]:
                axis.set_title(name, loc="center")
        row[0].set_ylabel(f"t = {times[number]:g}", fontsize=11, fontweight="bold")
        figure.colorbar(images[2], ax=list(row[:3]), extend="both", label="v", pad=0.01, aspect=14)
        figure.colorbar(images[3], ax=row[3], extend="both", label="analysis less truth", pad=0.02, aspect=14)
    rows, columns_seen = np.nonzero(np.isfinite(file["observed"][last][..., _SHOWN_SPECIES]))
    at = shown.index(last)
    axes[at][0].scatter(x[columns_seen] + x[1] / 2, y[rows] + y[1] / 2, s=5, color="white", linewidths=0)
    figure.suptitle(
        f"Gray-Scott, {len(y)} x {len(x)} points: the initial state from {len(rows)} observed points (white) at {last} "
        f"times up to t = {times[last]:g}",
        fontsize=12,
    )


def _draw_errors(axis: Axes, file: h5py.File) -> None:
    times, truth, last = file["time"][:], file["truth"][:].astype(np.float64), int(file.attrs["last_observed"])
    curves = {"first_guess": _FIRST_GUESS, "analysis": {**CURVE, "label": "analysis"}}
    for name, style in curves.items():
        axis.semilogy(times, root_mean_squares(file[name][:] - truth, (1, 2, 3)), **style)
    if "deviation" in file:
        spread = root_mean_squares(file["deviation"][:], (1, 2, 3))
        axis.semilogy(times, spread, color=OTHER_COLOUR, linestyle=":", linewidth=2, label="spread of the ensemble")
    axis.axvspan(0, times[last], color="#888888", alpha=0.12, linewidth=0, label="observed")
    axis.set_title("Error of u and v")
    axis.set_xlabel("time")
    axis.set_ylabel("root mean square error")
    axis.set_xlim(0, times[-1])
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, ncols=2)
