"""Plot of a run: training curves, one forecast beside the truth, and errors by lead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import xarray
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from pnode_dist.problems.common.calendar import time_label
from pnode_dist.problems.common.geography import is_longitude, unwrapped
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
_MOST_COLUMNS = 2
_UNEVEN = 0.05
_FAR = 45.0


def draw_report(path: Path, forecast: Path, metrics_file: Path, table: dict[str, Any]) -> None:
    """Draw `report.png` from the forecast file, the metrics file if present, and evaluate's table. Call on one rank.

    Maps show the first channel of the first variable, or of the first two side by side. The lead is 3, or the longest
    lead if that is shorter. The start is the middle one of the starts with a known truth.
    """
    # Restrict the style to this plot. Drawing must not require a display.
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, hspace=0.03)
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout=layout)
        grid = GridSpec(4, 2, figure=figure, height_ratios=(1, 1, 1, 2.1))
        with xarray.open_dataset(forecast, engine="h5netcdf", decode_timedelta=False) as data:
            shown = _shown_variables(data)
            for column, (name, units) in enumerate(shown):
                place = slice(None) if len(shown) == 1 else slice(column, column + 1)
                _draw_maps(figure, grid, place, data, table, name, units)
        name = table["variable"].replace("_", " ")
        figure.suptitle(
            f"{name[:1].upper()}{name[1:]}: learnt from {table['training']}, judged by {table['validation']}",
            fontsize=12,
        )
        draw_training(figure.add_subplot(grid[3, 0]), metrics_file, table["units"])
        _draw_errors(figure.add_subplot(grid[3, 1]), table)
        save(figure, path)


def _shown_variables(data: xarray.Dataset) -> list[tuple[str, str]]:
    """Return the name prefixes of the first variables' forecasts in the file, and their units."""
    names = [str(name).removesuffix("forecast") for name in data.data_vars if str(name).endswith("forecast")]
    return [(name, str(data[f"{name}forecast"].attrs.get("units", ""))) for name in names[:_MOST_COLUMNS]]


def _draw_maps(
    figure: Figure, grid: GridSpec, place: slice, data: xarray.Dataset, table: dict[str, Any], variable: str, units: str
) -> None:
    """Draw forecast, truth and their difference, one above the other."""
    lead = min(_SHOWN_LEAD, data.sizes["lead"])
    fields = data[[f"{variable}forecast", f"{variable}truth"]].isel(lead=lead - 1)
    dimensions = fields[f"{variable}forecast"].dims
    if len(dimensions) == 4:
        fields = fields.isel({dimensions[-1]: 0})
    known = np.flatnonzero(fields[f"{variable}truth"].notnull().any(dimensions[1:3]).to_numpy())
    shown = fields.isel(start=known[len(known) // 2] if len(known) else data.sizes["start"] // 2)
    forecast, truth = (shown[f"{variable}{kind}"].to_numpy().astype(np.float64) for kind in ("forecast", "truth"))
    name = variable.removesuffix("_") or table["variable"]
    names = [str(dimension) for dimension in dimensions[1:3]]
    error = forecast - truth
    # Limit the colour range, so that a few extreme cells do not hide the others.
    low, high = np.nanpercentile(np.concatenate([forecast.ravel(), truth.ravel()]), [1, 99])
    differs = error[np.isfinite(error)] if np.isfinite(error).any() else np.zeros(1)
    largest = max(float(np.percentile(np.abs(differs), 99)), 1e-12)
    common = {"vmin": low, "vmax": high, "cmap": "RdYlBu_r"}
    start, valid = (time_label(shown[key].to_numpy()[()], table["lead_unit"]) for key in ("start", "valid_time"))
    ahead = f"{lead} {table['lead_unit']}" if lead > 1 else f"one {table['lead_unit'].removesuffix('s')}"
    unit = f" ({units})" if units else ""
    root = float(np.sqrt(np.mean(differs**2)))
    rows = (
        (forecast, f"Forecast for {valid}, made {ahead} ahead from {start}", common),
        (truth, f"What came true, {valid}", common),
        (error, f"Forecast less truth: {root:.3g} {units} root mean square", difference_colours(largest)),
    )
    axes = []
    for row, (values, title, colours) in enumerate(rows):
        axis = figure.add_subplot(grid[row, place])
        image = draw_cells(axis, values, data[f"{variable}forecast"], names, row == 2, **colours)
        axis.set_title(title)
        axis.tick_params(labelbottom=row == len(rows) - 1)
        axes.append(axis)
        if row == 1:
            figure.colorbar(
                image,
                ax=axes,
                extend="both",
                label=f"{name.replace('_', ' ')}{unit}",
                aspect=14,
                pad=0.01,
            )
        if row == 2:
            figure.colorbar(image, ax=axis, extend="both", label=f"error{unit}", aspect=6, pad=0.01)


def difference_colours(largest: float) -> dict[str, Any]:
    """Return the colours of differences up to `largest`."""
    return {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}


def draw_cells(
    axis: Axes, values: Array, data: xarray.DataArray, names: Sequence[str], labelled: bool, **colours: Any
) -> Any:
    """Draw one field as coloured cells, grey outside the mask. A narrow strip is stretched to fill the width.

    `names` are the dimensions of `data` along y and x. Its two-dimensional coordinates or unequal spacings determine
    the cells' places. Otherwise rows and columns are equal. The horizontal axis has a label if `labelled`.
    """
    axis.set_facecolor(_LAND)
    plane = _plane(data, names)
    image: ScalarMappable
    if plane is not None:
        x, y, labels = plane
        # A cell between a pole of the grid and its far side would extend across the whole map.
        values = np.where(_jumps(x), np.nan, values)
        image = axis.pcolormesh(x, y, values, shading="nearest", rasterized=True, **colours)
        if x.ndim == 2 and np.isfinite(values).any():
            axis.set_xlim(x[np.isfinite(values)].min(), x[np.isfinite(values)].max())
    else:
        left, right = _edges(data, names[1])
        bottom, top = _edges(data, names[0])
        labels = (_label(data, names[1]), _label(data, names[0]))
        values = values[:: -1 if bottom > top else 1, :: -1 if left > right else 1]
        extent = (min(left, right), max(left, right), min(bottom, top), max(bottom, top))
        image = axis.imshow(values, origin="lower", extent=extent, aspect="auto", interpolation="nearest", **colours)
    axis.set_xlabel(labels[0] if labelled else "")
    axis.set_ylabel(labels[1])
    return image


def _plane(data: xarray.DataArray, names: Sequence[str]) -> tuple[Array, Array, tuple[str, str]] | None:
    """Return the cells' centres and axis labels, or None if equal rows and columns describe them."""
    flat = {str(name): value for name, value in data.coords.items() if set(map(str, value.dims)) == set(names)}
    for x_name, longitude in flat.items():
        for y_name, latitude in flat.items():
            if is_longitude(longitude.attrs) and latitude.attrs.get("standard_name") == "latitude":
                x, y = (value.transpose(*names).to_numpy().astype(np.float64) for value in (longitude, latitude))
                # Cells without finite coordinates cannot be drawn.
                if np.isfinite(x).all() and np.isfinite(y).all():
                    return _unwrapped(x), y, (_label(data, x_name), _label(data, y_name))
    centres = [_centres(data, name) for name in names]
    if any(values is not None and not _is_even(values) for values in centres):
        y, x = (
            np.arange(float(data.sizes[name])) if values is None else values
            for name, values in zip(names, centres, strict=True)
        )
        return x, y, (_label(data, names[1]), _label(data, names[0]))
    return None


def cell_centres(data: xarray.DataArray, names: Sequence[str]) -> tuple[Array, Array]:
    """Return where `draw_cells` draws the centres of all cells, `[y, x]` each: along x and along y."""
    plane = _plane(data, names)
    if plane is not None and plane[0].ndim == 2:
        return plane[0], plane[1]
    centres = [_centres(data, name) for name in names]
    y, x = (
        np.arange(float(data.sizes[name])) if values is None else values
        for name, values in zip(names, centres, strict=True)
    )
    return tuple(np.meshgrid(x, y))


def _unwrapped(longitudes: Array) -> Array:
    """Return two-dimensional longitudes without jumps along the first column and along every row."""
    turns = unwrapped(longitudes[:, 0]) - longitudes[:, 0]
    rows: Array = unwrapped(longitudes) + turns[:, None]
    return rows


def _jumps(x: Array) -> Array:
    """Return the mask of cells far from a neighbour, for two-dimensional longitudes. All false for one dimension."""
    far: Array = np.zeros(x.shape if x.ndim == 2 else (1, 1), dtype=bool)
    for along in (0, 1) if x.ndim == 2 else ():
        wide = np.abs(np.diff(x, axis=along)) > _FAR
        far |= np.insert(wide, 0, False, axis=along) | np.append(wide, np.zeros_like(far.take([0], along)), axis=along)
    return far


def _centres(data: xarray.DataArray, name: str) -> Array | None:
    """Return the cells' coordinates along a dimension, longitudes without jumps, or None without coordinates."""
    if name not in data.coords or data[name].dtype.kind not in "fiu":
        return None
    values = data[name].to_numpy().astype(np.float64)
    return unwrapped(values) if is_longitude(data[name].attrs) else values


def _is_even(values: Array) -> bool:
    spacing = np.diff(values)
    return len(spacing) < 2 or bool(np.ptp(spacing) <= _UNEVEN * np.abs(spacing).mean())


def _edges(data: xarray.DataArray, name: str) -> tuple[float, float]:
    """Return the outer edges of the first and the last cell along a dimension."""
    values = _centres(data, name)
    if values is None:
        values = np.arange(float(data.sizes[name]))
    first, last = float(values[0]), float(values[-1])
    half = (last - first) / (2 * max(len(values) - 1, 1)) or 0.5
    return first - half, last + half


def _label(data: xarray.DataArray, name: str) -> str:
    units = str(data[name].attrs.get("units", "")) if name in data.coords else ""
    return f"{name} (°{units[8].upper()})" if units.startswith("degrees_") else f"{name} ({units})" if units else name


def _draw_errors(axis: Axes, table: dict[str, Any]) -> None:
    """Draw the errors of the model and of the simple forecasts at each lead."""
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
