"""The picture of any forecast: a forecast beside the truth, the training, and errors against lead time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from pnode_dist.report.panels import MODEL_COLOUR, Array, draw_comparison, draw_training, report_figure

_SIZE = (12.0, 9.0)
_DPI = 110
_COLUMNS = 5
_LINES = 4
_COLOURS = ("#5b6770", "#1f78b4", "#4d8f3a", "#e08a1e", "#7b5ea7")
_DECADES = 30.0


def draw_report(path: Path, forecast: Path, metrics_file: Path, result: Mapping[str, Any]) -> None:
    """Draw a picture from the forecast file, the metrics file if there is one, and the figures of an evaluation.

    Above are the first forecast and the truth: maps of a state on a plane or lines of one on an axis, at up to five
    leads; of other states the entries that vary most, over time. For one rank.
    """
    with report_figure(path, forecast, _SIZE, pad=0.04, dpi=_DPI) as (figure, file):
        (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.6, 1))
        axes = _space_axes(file)
        if len(axes) == 2:
            _draw_maps(above, file, axes)
        elif len(axes) == 1 and file["truth"].shape[axes[0]] > _LINES:
            _draw_profiles(above, file, axes[0])
        else:
            _draw_series(above, file)
        left, right = below.subplots(1, 2)
        draw_training(left, metrics_file, str(result.get("units", "")))
        _draw_errors(right, result)
        figure.suptitle(f"{result['problem']}: the first of {file['truth'].shape[0]} forecasts", fontsize=12)


def _space_axes(file: h5py.File) -> list[int]:
    """The axes of `truth` along z, y or x; those of a state on a grid."""
    names = [_name(file, number) for number in range(file["truth"].ndim)]
    # A state on a grid has its axes, then its channels.
    named = [number for number, name in enumerate(names) if name in ("x", "y", "z")]
    return named or ([2, 3] if file["truth"].ndim == 5 else [])


def _name(file: h5py.File, axis: int) -> str:
    scale = file["truth"].dims[axis][0]
    return str(scale.name).rpartition("/")[2]


def _first_forecast(file: h5py.File, name: str, shown: Array, kept: Sequence[int]) -> Array:
    """The first forecast at the `shown` leads, `[lead, *kept axes]`, the first entry along every other axis."""
    data = file[name]
    index = tuple(shown if axis == 1 else slice(None) if axis in kept else 0 for axis in range(data.ndim))
    found: Array = np.asarray(data[index], dtype=np.float64)
    return found


def _shown_leads(file: h5py.File) -> Array:
    shown: Array = np.unique(np.linspace(0, file["truth"].shape[1] - 1, _COLUMNS).round().astype(int))
    return shown


def _times(file: h5py.File) -> Array:
    """The time since the start of the first forecast, of each lead."""
    since: Array = np.asarray(file["lead_time"], dtype=np.float64)
    return since


def _channel(file: h5py.File) -> str:
    """The name of the entry that is shown along the last axis."""
    data = file["truth"]
    name = _name(file, data.ndim - 1)
    first = file[name][0]
    return first.decode() if isinstance(first, bytes) else f"{name} {first}"


def _draw_maps(figure: SubFigure, file: h5py.File, axes: Sequence[int]) -> None:
    """Truth, forecast and their difference, one below the other, a column for each of some leads."""
    shown, times = _shown_leads(file), _times(file)
    truth, forecast = (_first_forecast(file, name, shown, axes) for name in ("truth", "forecast"))
    low, high = np.nanpercentile(truth, [0.5, 99.5])

    def draw_one(axis: Axes, values: Array, **colours: Any) -> Any:
        axis.set(xticks=[], yticks=[])
        return axis.imshow(values, origin="lower", interpolation="nearest", aspect="auto", **colours)

    titles = [f"+ {times[lead]:g}" for lead in shown]
    draw_comparison(figure, draw_one, truth, forecast, titles, _channel(file), vmin=low, vmax=high, cmap="viridis")


def _draw_profiles(figure: SubFigure, file: h5py.File, along: int) -> None:
    """Truth and forecast along the axis, a panel for each of some leads."""
    shown, times = _shown_leads(file), _times(file)
    truth, forecast = (_first_forecast(file, name, shown, [along]) for name in ("truth", "forecast"))
    places = np.asarray(file[_name(file, along)])
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for number, (lead, axis) in enumerate(zip(shown, panels, strict=True)):
        axis.plot(places, truth[number], color="#2b2b2b", linewidth=1.6, label="truth")
        axis.plot(places, forecast[number], color=MODEL_COLOUR, linewidth=1.6, linestyle="--", label="forecast")
        axis.set_title(f"+ {times[lead]:g}", fontsize=10, fontweight="normal", loc="center")
        axis.set_xlabel(_name(file, along))
        axis.grid(alpha=0.25)
    panels[0].set_ylabel(_channel(file))
    panels[0].legend(fontsize=9)


def _draw_series(figure: SubFigure, file: h5py.File) -> None:
    """Truth and forecast of the entries that vary most, over time."""
    times = _times(file)
    entries = np.sort(np.argsort(-_spread(file), kind="stable")[:_LINES])
    places = [tuple(map(int, np.unravel_index(entry, file["truth"].shape[2:]))) for entry in entries]
    truth, forecast = (
        np.stack([np.asarray(file[name][(0, slice(None), *place)], dtype=np.float64) for place in places], axis=1)
        for name in ("truth", "forecast")
    )
    panels = figure.subplots(1, len(entries), squeeze=False)[0]
    for number, (place, axis) in enumerate(zip(places, panels, strict=True)):
        axis.plot(times, truth[:, number], color="#2b2b2b", linewidth=1.6, label="truth")
        axis.plot(times, forecast[:, number], color=MODEL_COLOUR, linewidth=1.6, linestyle="--", label="forecast")
        axis.set_title(f"entry {', '.join(str(number) for number in place)}", fontsize=10, fontweight="normal")
        axis.set_xlabel("time since the start")
        axis.grid(alpha=0.25)
    panels[0].legend(fontsize=9)


def _spread(file: h5py.File) -> Array:
    """The standard deviation of each entry of the first true trajectory over time, read lead by lead; 0 without any."""
    truth = file["truth"]
    count = mean = squares = np.zeros(int(np.prod(truth.shape[2:])))
    for lead in range(truth.shape[1]):
        values = np.asarray(truth[0, lead], dtype=np.float64).ravel()
        there = np.isfinite(values)
        count = count + there
        # Updated means, as sums of squares lose the digits of a small spread.
        step = np.where(there, values - mean, 0.0)
        mean = mean + step / np.maximum(count, 1)
        squares = squares + step * np.where(there, values - mean, 0.0)
    spread: Array = np.sqrt(squares / np.maximum(count, 1))
    return spread


def _draw_errors(axis: Axes, result: Mapping[str, Any]) -> None:
    """The errors of the model and of the baselines at each evaluated lead."""
    rows = result["rmse"]
    times = [row["time"] for row in rows]
    names = [name for name in rows[0] if name not in ("lead", "time")]
    largest = smallest = None
    for number, name in enumerate(names):
        errors = [row[name] for row in rows]
        if name == "model":
            axis.plot(times, errors, color=MODEL_COLOUR, linewidth=2.4, marker="o", markersize=4, label=name, zorder=3)
        else:
            colour = _COLOURS[(number - 1) % len(_COLOURS)]
            axis.plot(times, errors, color=colour, linestyle="--", marker=".", label=name.replace("_", " "))
        finite = [error for error in errors if np.isfinite(error) and error > 0]
        if finite:
            largest, smallest = max(largest or 0.0, *finite), min(smallest or np.inf, *finite)
    if largest is not None and smallest is not None and largest > _DECADES * smallest:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    units = str(result.get("units", ""))
    axis.set_title("Error against lead time")
    axis.set_xlabel("time since the start")
    axis.set_ylabel(f"root mean square error ({units})" if units else "root mean square error")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9)
