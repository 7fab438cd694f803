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

from pnode_dist.problems.field_data import time_label
from pnode_dist.train import metrics

Array = npt.NDArray[Any]

_LAND = "#b9b9b9"
_INK = "#2b2b2b"
_MODEL = "#c1272d"
_CURVES: dict[str, dict[str, Any]] = {
    "model": {"label": "neural ODE", "color": _MODEL, "linewidth": 2.4, "marker": "o", "zorder": 3},
    "persistence": {"label": "persistence", "color": "#5b6770", "linestyle": "--", "marker": "s"},
    "climatology": {"label": "climatology", "color": "#1f78b4", "linestyle": "-.", "marker": "^"},
    "anomaly_persistence": {"label": "anomaly persistence", "color": "#e08a1e", "linestyle": ":", "marker": "D"},
    "damped_persistence": {"label": "damped persistence", "color": "#4d8f3a", "linestyle": (0, (3, 1)), "marker": "v"},
}
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#777777",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_SIZE = (12.0, 8.6)
_DPI = 120
_SHOWN_LEAD = 3
_LOGARITHMIC = 20


def draw_report(path: Path, forecast: Path, metrics_file: Path, table: dict[str, Any]) -> None:
    """Draw `report.png` from the forecast file, the metrics file if there is one, and evaluate's table. For one rank.

    Maps show the first channel at lead 3, or the longest lead if it is shorter, from the start in the middle.
    """
    # Only this picture is to look like this, and no display is to be needed.
    with matplotlib.rc_context(_STYLE):
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
        _draw_training(figure.add_subplot(grid[3, 0]), metrics_file, table["units"])
        _draw_errors(figure.add_subplot(grid[3, 1]), table)
        figure.savefig(path)


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


def _draw_training(axis: Axes, metrics_file: Path, units: str) -> None:
    """The training loss of each step and its mean over each epoch, and the validation error if it was computed."""
    records = list(metrics.read(metrics_file)) if metrics_file.exists() else []
    steps = [record for record in records if record["kind"] == "step" and record["loss"] is not None]
    axis.set_title("Training")
    if not steps:
        axis.text(0.5, 0.5, "no metrics file", ha="center", transform=axis.transAxes)
        return
    numbers, losses = (np.array([record[key] for record in steps]) for key in ("step", "loss"))
    epochs = np.array([record["epoch"] for record in steps])
    axis.plot(numbers, losses, color=_MODEL, alpha=0.3, linewidth=1, label="loss of a batch")
    means = [(numbers[epochs == epoch].max(), losses[epochs == epoch].mean()) for epoch in np.unique(epochs)]
    axis.plot(*zip(*means, strict=True), color=_MODEL, linewidth=2.2, marker="o", markersize=4, label="epoch mean")
    if losses.max() > _LOGARITHMIC * losses.min():
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1.25 * losses.max())
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("loss (normalised)")
    axis.grid(alpha=0.25)
    lines, labels = axis.get_legend_handles_labels()
    checks = [record for record in records if record["kind"] == "validation" and record["figures"]]
    if len(checks) > 1:
        other = axis.twinx()
        figures = [next(iter(record["figures"].values())) for record in checks]
        (line,) = other.plot([record["step"] for record in checks], figures, color="#1f78b4", marker="^", markersize=5)
        other.set_ylim(0, 1.35 * max(figures))
        other.set_ylabel(f"validation error ({units})" if units else "validation error")
        other.spines["right"].set_visible(True)
        lines, labels = [*lines, line], [*labels, "validation error, all leads"]
    axis.legend(lines, labels, loc="upper center", ncols=len(lines), fontsize=9, handlelength=1.4, columnspacing=1.0)


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
