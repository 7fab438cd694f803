"""Figure of an analysis: truth and observations, first guess, analysis and errors, minimisation, and forecast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pnode_dist.problems.field.plots import cell_centres, difference_colours, draw_cells
from pnode_dist.report.panels import CURVE, OTHER_COLOUR, PERSISTENCE, STYLE, draw_minimisation, save

_SIZE, _DPI = (12.0, 11.6), 120
_CURVES: dict[str, dict[str, Any]] = {
    "first_guess": {"color": OTHER_COLOUR, "linestyle": "-.", "marker": "^", "label": "first guess"},
    "analysis": {**CURVE, "marker": "o", "label": "analysis and its forecast"},
    "persistence": {**PERSISTENCE, "marker": "s"},
}


def draw_analysis(path: Path, analysis: Path, metrics_file: Path, table: dict[str, Any]) -> None:
    """Draw `report.png` from the file of an analysis, the metrics of its inversion and its figures. Call on one rank.

    Maps show the first channel of the first variable at the first time.
    """
    with (
        matplotlib.rc_context(STYLE),
        xarray.open_dataset(analysis, engine="h5netcdf", decode_timedelta=False) as data,
    ):
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.05, hspace=0.03))
        grid = GridSpec(6, 2, figure=figure, height_ratios=(1, 1, 1, 1, 1, 2.2))
        _draw_maps(figure, grid, data, table)
        draw_minimisation(figure.add_subplot(grid[5, 0]), metrics_file)
        _draw_errors(figure.add_subplot(grid[5, 1]), table)
        seen = sum(row["observed"] == "yes" for row in table["rmse"])
        name = table["variable"].replace("_", " ")
        figure.suptitle(
            f"{name[:1].upper()}{name[1:]} of {table['rmse'][0]['time']} from {table['observations']} observations at "
            f"{seen} {'times' if seen > 1 else 'time'}",
            fontsize=12,
        )
        save(figure, path)


def _draw_maps(figure: Figure, grid: GridSpec, data: xarray.Dataset, table: dict[str, Any]) -> None:
    prefix = next(str(name) for name in data.data_vars if str(name).endswith("truth")).removesuffix("truth")
    places = data[f"{prefix}truth"]
    names = [str(dimension) for dimension in places.dims[1:3]]
    shown = data.isel({"time": 0, **{str(dimension): 0 for dimension in places.dims[3:]}})
    truth, observed, guess, analysis = (
        shown[f"{prefix}{kind}"].to_numpy().astype(np.float64)
        for kind in ("truth", "observed", "first_guess", "analysis")
    )
    known = truth[np.isfinite(truth)] if np.isfinite(truth).any() else np.zeros(1)
    low, high = np.percentile(known, [1, 99])
    common = {"vmin": low, "vmax": high, "cmap": "RdYlBu_r"}
    wrong = np.abs(guess - truth)
    # Limit the colour range, so that a few extreme cells do not hide the others.
    largest = max(float(np.percentile(wrong[np.isfinite(wrong)], 99)) if np.isfinite(wrong).any() else 0.0, 1e-12)
    first = table["rmse"][0]
    units = str(places.attrs.get("units", ""))
    rows = (
        (truth, "Truth, and the observed cells", common),
        (guess, "First guess: the seasonal cycle", common),
        (analysis, "Analysis", common),
        (guess - truth, _named("First guess", first["first_guess"], table), difference_colours(largest)),
        (analysis - truth, _named("Analysis", first["analysis"], table), difference_colours(largest)),
    )
    axes, images = [], []
    for row, (values, title, colours) in enumerate(rows):
        axis = figure.add_subplot(grid[row, :])
        images.append(draw_cells(axis, values, places, names, row == len(rows) - 1, **colours))
        axis.set_title(title)
        axis.tick_params(labelbottom=row == len(rows) - 1)
        axes.append(axis)
    _draw_points(axes[0], np.isfinite(observed), places, names)
    unit = f" ({units})" if units else ""
    name = prefix.removesuffix("_") or table["variable"]
    figure.colorbar(images[0], ax=axes[:3], extend="both", label=f"{name.replace('_', ' ')}{unit}", aspect=18, pad=0.01)
    figure.colorbar(images[3], ax=axes[3:], extend="both", label=f"error{unit}", aspect=12, pad=0.01)


def _named(name: str, error: float, table: dict[str, Any]) -> str:
    return f"{name} less truth: {error:.3g} {table['units']} root mean square in cells that are not observed"


def _draw_points(axis: Axes, seen: Any, data: xarray.DataArray, names: list[str]) -> None:
    rows, columns = np.nonzero(seen)
    x, y = cell_centres(data, names)
    axis.scatter(x[rows, columns], y[rows, columns], s=4, color="black", linewidths=0)


def _draw_errors(axis: Axes, table: dict[str, Any]) -> None:
    rows = table["rmse"]
    places = np.arange(len(rows))
    for name, style in _CURVES.items():
        axis.plot(places, [row[name] for row in rows], markersize=5, **style)
    seen = sum(row["observed"] == "yes" for row in rows)
    axis.axvspan(-0.5, seen - 0.5, color="#888888", alpha=0.12, linewidth=0, label="observed times")
    axis.set_title("Error in cells that are not observed")
    axis.set_xticks(places, [row["time"] for row in rows], rotation=20)
    axis.set_ylabel(f"root mean square error ({table['units']})" if table["units"] else "root mean square error")
    axis.set_xlim(-0.5, len(rows) - 0.5)
    axis.set_ylim(0, 1.35 * max(row[name] for row in rows for name in _CURVES))
    axis.grid(alpha=0.25)
    axis.legend(loc="upper left", ncols=2, fontsize=9)
