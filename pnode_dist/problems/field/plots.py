"""The picture of a run: how it was learnt, one forecast beside what came true, and errors by lead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import xarray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from pnode_dist.problems.field.data import time_label
from pnode_dist.report.panels import MODEL_COLOUR, STYLE, draw_training, save

Array = npt.NDArray[Any]

_LAND = "#b9b9b9"
_CURVES: dict[str, dict[str, Any]] = {
    "model": {"label": "neural ODE", "color": MODEL_COLOUR, "linewidth": 2.4, "marker": "o", "zorder": 3},
    "persistence": {"label": "persistence", "color": "#5b6770", "linestyle": "--", "marker": "s"},
    "climatology": {"label": "climatology", "color": "#1f78b4", "linestyle": "-.", "marker": "^"},
    "anomaly_persistence": {"label": "anomaly persistence", "color": "#e08a1e", "linestyle": ":", "marker": "D"},
    "damped_persistence": {"label": "damped persistence", "color": "#4d8f3a", "linestyle": (0, (3, 1)), "marker": "v"},
}
_SIZE = (12.0, 8.6)
_DPI = 120
_SHOWN_LEAD = 3


def draw_report(path: Path, forecast: Path, metrics_file: Path, table: dict[str, Any]) -> None:
    """Draw `report.png` from the forecast file, the metrics file if there is one, and evaluate's table. For one rank.

    Maps show the first channel at lead 3, or the longest lead if it is shorter, from the start in the middle.
    """
    # Only this picture is to look like this, and no display is to be needed.
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, hspace=0.03)
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout=layout)
        grid = GridSpec(4, 2, figure=figure, height_ratios=(1, 1, 1, 2.1))
        with xarray.open_dataset(forecast, engine="h5netcdf", decode_timedelta=False) as data:
            _draw_maps(figure, grid, data, table)
        name = table["variable"].replace("_", " ")
        figure.suptitle(
            f"{name[:1].upper()}{name[1:]}: learnt from {table['training']}, judged by {table['validation']}",
            fontsize=12,
        )
        draw_training(figure.add_subplot(grid[3, 0]), metrics_file, table["units"])
        _draw_errors(figure.add_subplot(grid[3, 1]), table)
        save(figure, path)


def _draw_maps(figure: Figure, grid: GridSpec, data: xarray.Dataset, table: dict[str, Any]) -> None:
    """Forecast, truth and their difference, one above the other."""
    lead = min(_SHOWN_LEAD, data.sizes["lead"])
    shown = data.isel(start=data.sizes["start"] // 2, lead=lead - 1)
    if shown["forecast"].ndim == 3:
        shown = shown.isel({shown["forecast"].dims[-1]: 0})
    forecast, truth = (shown[name].to_numpy().astype(np.float64) for name in ("forecast", "truth"))
    error = forecast - truth
    # A few extreme cells must not wash out the rest.
    low, high = np.nanpercentile(np.concatenate([forecast.ravel(), truth.ravel()]), [1, 99])
    largest = max(float(np.nanpercentile(np.abs(error), 99)), 1e-12)
    common = {"vmin": low, "vmax": high, "cmap": "RdYlBu_r"}
    start, valid = (time_label(shown[name].to_numpy()[()], table["lead_unit"]) for name in ("start", "valid_time"))
    ahead = f"{lead} {table['lead_unit']}" if lead > 1 else f"one {table['lead_unit'].removesuffix('s')}"
    units = f" ({table['units']})" if table["units"] else ""
    root = float(np.sqrt(np.nanmean(error**2)))
    rows = (
        (forecast, f"Forecast for {valid}, made {ahead} ahead from {start}", common),
        (truth, f"What came true, {valid}", common),
        (error, f"Forecast less truth: {root:.2f} {table['units']} root mean square", _difference(largest)),
    )
    axes = []
    for row, (values, title, colours) in enumerate(rows):
        axis = figure.add_subplot(grid[row, :])
        image = _map(axis, values, data, **colours)
        axis.set_title(title)
        axis.tick_params(labelbottom=row == len(rows) - 1)
        axes.append(axis)
        if row == 1:
            figure.colorbar(
                image,
                ax=axes,
                extend="both",
                label=f"{table['variable'].replace('_', ' ')}{units}",
                aspect=14,
                pad=0.01,
            )
        if row == 2:
            figure.colorbar(image, ax=axis, extend="both", label=f"error{units}", aspect=6, pad=0.01)


def _difference(largest: float) -> dict[str, Any]:
    return {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}


def _map(axis: Axes, values: Array, data: xarray.Dataset, **colours: Any) -> Any:
    """One field as coloured cells, grey outside the mask, stretched to fill the width where it is a narrow strip."""
    names = data["forecast"].dims[2:4]
    extent = (*_edges(data, str(names[1])), *_edges(data, str(names[0])))
    axis.set_facecolor(_LAND)
    image = axis.imshow(values, origin="lower", extent=extent, aspect="auto", interpolation="nearest", **colours)
    axis.set_xlabel(_label(data, str(names[1])) if axis.get_subplotspec().rowspan.start == 2 else "")  # type: ignore[union-attr]
    axis.set_ylabel(_label(data, str(names[0])))
    return image


def _edges(data: xarray.Dataset, name: str) -> tuple[float, float]:
    """The outer edges of the first and the last cell along a dimension."""
    values = data[name].to_numpy() if name in data.coords else np.arange(data.sizes[name])
    first, last = float(values[0]), float(values[-1])
    half = (last - first) / (2 * max(len(values) - 1, 1)) or 0.5
    return first - half, last + half


def _label(data: xarray.Dataset, name: str) -> str:
    units = str(data[name].attrs.get("units", "")) if name in data.coords else ""
    return f"{name} (°{units[8].upper()})" if units.startswith("degrees_") else f"{name} ({units})" if units else name


def _draw_errors(axis: Axes, table: dict[str, Any]) -> None:
    """The error of the model and of the simple forecasts at each lead."""
    rows = table["rmse"]
    leads = [row["lead"] for row in rows]
    for name, style in _CURVES.items():
        axis.plot(leads, [row[name] for row in rows], markersize=5, **style)
    axis.set_title(f"Error on the validation data, {table['forecasts'].split(',')[0]}")
    axis.set_xlabel(f"lead ({table['lead_unit']})")
    axis.set_ylabel(f"root mean square error ({table['units']})" if table["units"] else "root mean square error")
    axis.set_ylim(0, 1.4 * max(max(row[name] for name in _CURVES) for row in rows))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    axis.legend(loc="upper left", ncols=2, fontsize=9)
