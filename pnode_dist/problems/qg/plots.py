"""Figure of a quasi-geostrophic run: fields of long runs with each closure, their statistics and their scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import NullFormatter

from pnode_dist.report.panels import (
    MODEL_COLOUR,
    OTHER_COLOUR,
    PERSISTENCE,
    TRUTH_COLOUR,
    draw_comparison,
    draw_errors,
    draw_training,
    report_figure,
    root_mean_squares,
)

_SIZE = (14.0, 8.6)
_LONG_SIZE = (14.0, 14.0)
_SAMPLES = 6
_DARK = 0.75
_MAP_TITLE = "potential vorticity (1/s), upper layer"
RUNS: dict[str, dict[str, Any]] = {
    "truth": {"label": "truth", "color": "#2b2b2b", "linewidth": 2.2},
    "no_closure": {"label": "no closure", "color": OTHER_COLOUR, "linestyle": "--"},
    "model": {"label": "learnt", "color": MODEL_COLOUR, "linewidth": 2.2, "zorder": 3},
    "smagorinsky": {"label": "Smagorinsky", "color": "#33a02c", "linestyle": "-."},
    "backscatter": {"label": "backscatter", "color": "#e6a11a", "linestyle": ":", "linewidth": 2.2},
    "zanna_bolton": {"label": "Zanna-Bolton", "color": "#8e5ea2", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
}
"""The label and the style of each run."""


def draw_report(path: Path, forecast: Path, metrics_file: Path, result: Mapping[str, Any]) -> None:
    """Draw `report.png` from the forecast file, evaluate's table and the metrics file if present. Call on one rank.

    Maps show the upper layer: with long runs the last state of each, else the first held-out trajectory.
    """
    with h5py.File(forecast, "r") as file:
        is_long = "free_run_q" in file
    with report_figure(path, forecast, _LONG_SIZE if is_long else _SIZE) as (figure, file):
        ny, nx = result["grid"]
        title = f"{result['configuration']} turbulence on {ny} x {nx} points, learnt from {result['fine_grid'][0]} x "
        figure.suptitle(f"{title}{result['fine_grid'][1]}", fontsize=12)
        if is_long:
            (maps,), (statistics,), (scores,), (curves,) = figure.subfigures(
                4, 1, squeeze=False, height_ratios=(1.05, 1, 1, 0.95)
            )
            _draw_runs(maps, file, result)
            _draw_statistics(statistics, file)
            table, energy = scores.subplots(1, 2, width_ratios=(2.2, 1))
            _draw_scores(table, result)
            _draw_energy(energy, file)
        else:
            (maps,), (curves,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.9, 1))
            _draw_rollout(maps, file)
        left, right = curves.subplots(1, 2)
        draw_training(left, metrics_file, "")
        _draw_errors(right, file)


def names_of(file: h5py.File) -> list[str]:
    """Return the names of the long runs in the order of the file."""
    return [str(name) for name in file["free_run"].asstr()[:]]


def largest_value(truth: Any) -> float:
    """Return the end of the colour scale of potential vorticity, which cuts off few values of the truth."""
    return max(float(np.nanpercentile(np.abs(truth), 99.5)), 1e-12)


def _show(axis: Axes, values: Any, largest: float) -> Any:
    axis.set(xticks=[], yticks=[])
    return axis.imshow(values, origin="lower", interpolation="nearest", cmap="RdBu_r", vmin=-largest, vmax=largest)


def _draw_runs(figure: SubFigure, file: h5py.File, result: Mapping[str, Any]) -> None:
    """Draw the last state of each run."""
    states, names = file["free_run_q"], names_of(file)
    days = file["sample_time"][:]
    ends = {row["of"]: row["blown_up"] for row in result["free_runs"]}
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    largest = largest_value(states[names.index("truth"), ..., 0])
    for number, (axis, name) in enumerate(zip(axes, names, strict=True)):
        last = int(np.flatnonzero(np.isfinite(states[number, :, 0, 0, 0]))[-1])
        image = _show(axis, states[number, last, ..., 0], largest)
        blown_up = ends.get(name)
        when = f"day {days[last]:.4g}" if blown_up is None else f"blows up on day {blown_up:.4g}"
        axis.set_title(f"{_style(name)['label']}, {when}", fontsize=10)
    figure.colorbar(image, ax=axes.tolist(), extend="both", label=_MAP_TITLE, aspect=14, shrink=0.8, pad=0.01)


def _draw_statistics(figure: SubFigure, file: h5py.File) -> None:
    """Draw spectra of energy, its flux, and the distribution of potential vorticity."""
    upper, lower, flux, distribution = figure.subplots(1, 4)
    wave_number = file["wave_number"][:]
    resolved = float(file["wave_number"].attrs["resolved"])
    kept = wave_number < resolved
    for number, name in enumerate(names_of(file)):
        style = _style(name)
        for layer, axis in enumerate((upper, lower)):
            if np.isfinite(file["KEspec"][number, layer]).all():
                axis.loglog(wave_number, file["KEspec"][number, layer], **style)
        flux.semilogx(wave_number[kept], 1e6 * file["KEflux"][number][kept], **style)
        density = file["density_q"][number, 0]
        # An empty cell has no logarithm.
        distribution.semilogy(1e5 * file["cells_q"][0], np.where(density > 0, density, np.nan), **style)
    spectrum = file["KEspec"][names_of(file).index("truth")]
    for axis, values, title in ((upper, spectrum[0], "Energy, upper layer"), (lower, spectrum[1], "lower layer")):
        shown = values[kept & (values > 0)]
        axis.set(
            title=title,
            xlim=(wave_number[0], 2 * resolved),
            xlabel="wave number (rad/m)",
            ylabel="$u^2 + v^2$ (m$^3$/s$^2$)",
        )
        axis.set_ylim(shown.min() / 30, 4 * shown.max())
        axis.axvline(resolved, color="#bbbbbb", linewidth=1)
    flux.set(title="Transfer of kinetic energy", xlabel="wave number (rad/m)", ylabel="$10^{-6}$ m$^3$/s$^3$")
    flux.axhline(0, color="#bbbbbb", linewidth=1)
    distribution.set(
        title="Distribution, upper layer", xlabel="potential vorticity ($10^{-5}$/s)", ylabel="density (s)"
    )
    for axis in (upper, lower, flux):
        axis.xaxis.set_minor_formatter(NullFormatter())
    for axis in (upper, lower, flux, distribution):
        axis.grid(alpha=0.25)
    upper.legend(fontsize=8, loc="lower left")


def _draw_scores(axis: Axes, result: Mapping[str, Any]) -> None:
    """Draw the scores of all closures as a table of colours."""
    rows = result["scores"]
    axis.set_title("Similarity to the truth (1: as the truth, 0: as without closure)")
    runs = [name for name in RUNS if rows and name in rows[0]]
    if not runs:
        axis.axis("off")
        axis.text(0.5, 0.5, "no scores: the run without closure blew up", ha="center", transform=axis.transAxes)
        return
    means = {row["of"]: row for row in result["free_runs"]}
    columns = [str(row["statistic"]) for row in rows]
    values = np.array([[_number(row[name]) for row in rows] for name in runs])
    averages = np.array([[_number(means[name][kind]) for kind in ("distributional", "spectral")] for name in runs])
    table = np.concatenate([values, averages], axis=1)
    axis.imshow(table, cmap="RdYlGn", vmin=-1, vmax=1, aspect="auto")
    axis.set_xticks(range(table.shape[1]), [*columns, "distributions", "spectra"], rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(len(runs)), [_style(name)["label"] for name in runs])
    axis.axvline(len(columns) - 0.5, color="white", linewidth=4)
    for (row, column), value in np.ndenumerate(table):
        text = f"{value:.2f}" if abs(value) < 10 else "<-10" if value < 0 else ">10"
        colour = "white" if abs(value) > _DARK else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axis.spines[:].set_visible(False)


def _number(value: float | None) -> float:
    """Return a score; one that evaluation.json holds as null is minus infinity."""
    return -np.inf if value is None else value


def _draw_energy(axis: Axes, file: h5py.File) -> None:
    """Draw the kinetic energy of each run over time."""
    for number, name in enumerate(names_of(file)):
        axis.plot(file["sample_time"][:], 1e4 * file["energy"][number], **_style(name))
    axis.set(title="Kinetic energy of the eddies", xlabel="days", ylabel="cm$^2$/s$^2$")
    # Limit the axis, so that a run that blows up does not flatten the others.
    truth = 1e4 * file["energy"][names_of(file).index("truth")]
    axis.set_ylim(0, 2 * float(np.nanmax(truth)))
    axis.grid(alpha=0.25)


def _draw_rollout(figure: SubFigure, file: h5py.File) -> None:
    """Draw truth, rollout and their difference of the first held-out trajectory."""
    times = file["time"][:]
    shown = np.unique(np.linspace(0, len(times) - 1, _SAMPLES).round().astype(int))
    truth, forecast = (file[name][0, :, :, :, 0][shown].astype(np.float64) for name in ("truth", "forecast"))
    titles = [f"day {times[number] / 24:.4g}" for number in shown]
    largest = largest_value(truth)
    colours = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}

    def draw_one(axis: Axes, values: Any, **given: Any) -> Any:
        axis.set(xticks=[], yticks=[])
        return axis.imshow(values, origin="lower", interpolation="nearest", **given)

    draw_comparison(figure, draw_one, truth, forecast, titles, _MAP_TITLE, **colours)


def _draw_errors(axis: Axes, file: h5py.File) -> None:
    """Draw the errors of all forecasts, in standard deviations of the truth."""
    truth = file["truth"][:, 1:].astype(np.float64)
    deviation = truth.std(axis=(0, 1, 2, 3))
    curves = {"model": "forecast", **{name: name for name in (*RUNS, "persistence") if name in file}}
    errors, styles = {}, {}
    for name, variable in curves.items():
        if name == "truth":
            continue
        departure = (file[variable][:, 1:] - truth) / deviation
        errors[name] = root_mean_squares(departure, (0, 2, 3, 4))
        styles[name] = PERSISTENCE if name == "persistence" else _style(name)
    days = file["time"][1:] / 24
    draw_errors(axis, days, errors, styles, "error (standard deviations)", "days since the initial state")
    # Limit the axis, so that a rollout that blows up does not flatten the others.
    axis.set_ylim(0, 1.3 * float(np.nanmax(errors["persistence"])))
    axis.legend(fontsize=8, ncols=2)


def _style(name: str) -> dict[str, Any]:
    return RUNS.get(name, {"label": name.replace("_", " "), "color": TRUTH_COLOUR})
