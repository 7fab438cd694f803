"""Plots of `pnode-dist bench --plot`, drawn from the rows of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pnode_dist.bench.methods.plot import draw_methods
from pnode_dist.bench.report import Report, Row
from pnode_dist.report.panels import MODEL_COLOUR, STYLE, save

_WORK, _OTHER, _THIRD, _LIMIT = "#a9b4bc", "#1f78b4", "#e8a33d", "#5b6770"
_DPI = 120
_BAR = 0.38


def draw_bench(path: Path, report: Report) -> None:
    """Draw the rows of a benchmark that has a plot. Call on one rank."""
    drawing, size = DRAWINGS[report.name]
    # Restrict the style to this plot. Drawing must not require a display.
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        drawing(figure, report)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(figure, path)


def _named(axis: Axes, names: Sequence[str]) -> None:
    """Label horizontal bars at the left, the first name on top."""
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def _written(axis: Axes, values: Sequence[float], ends: Sequence[float], form: str, shift: float = 0.0) -> None:
    """Write a value after the end of each horizontal bar."""
    for number, (value, end) in enumerate(zip(values, ends, strict=True)):
        if math.isfinite(value):
            axis.annotate(
                form.format(value),
                (max(end, 0.0), number + shift),
                textcoords="offset points",
                xytext=(4, 0),
                va="center",
                fontsize=8,
            )


def _numbers(rows: Sequence[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows]


def _overhead(figure: Figure, report: Report) -> None:
    """Draw the time per stage on f and besides f, forward and adjoint, with a row of panels for each problem."""
    problems = list(dict.fromkeys(str(row["problem"]) for row in report.rows))
    axes = figure.subplots(len(problems), 2, squeeze=False)
    columns = (("forward", "f", "overhead"), ("adjoint", "f, grad", "adjoint overhead"))
    for line, problem in zip(axes, problems, strict=True):
        for axis, (whole, of_f, beyond) in zip(line, columns, strict=True):
            rows = [row for row in report.rows if row["problem"] == problem and math.isfinite(float(row[whole]))]
            work, total, besides = (_numbers(rows, key) for key in (of_f, whole, beyond))
            places = range(len(rows))
            axis.barh(places, work, color=_WORK, label="the work on f, measured alone")
            colours = [MODEL_COLOUR if row["solver"] == "pnode_dist" else _OTHER for row in rows]
            axis.barh(places, [max(value, 0.0) for value in besides], left=work, color=colours)
            _named(axis, [f"{row['solver']}, keeps {row['keeps']}" for row in rows])
            _written(axis, besides, [max(pair) for pair in zip(total, work, strict=True)], "{:+.1f}")
            axis.set_title(f"{'A stage forward' if whole == 'forward' else 'Its adjoint'}: {problem}")
            axis.set_xlim(0, 1.15 * max(*total, *work))
            axis.set_xlabel("microseconds of processor time")
    axes[0, 0].legend(loc="upper right", fontsize=9)


def _halo(figure: Figure, report: Report) -> None:
    """Draw the bytes sent by exchanges against the bytes needed, and their times."""
    rows = report.rows
    sizes, times = figure.subplots(1, 2, sharey=True)
    names = [f"{row['grid']}\nwidth {row['width']}, {row['ranks']} ranks" for row in rows]
    kinds = (("bytes", MODEL_COLOUR, "sent"), ("bytes back", _THIRD, "sent back"), ("least", _WORK, "needed"))
    for number, (key, colour, label) in enumerate(kinds):
        places = [place + 0.27 * (number - 1) for place in range(len(rows))]
        sizes.barh(places, [value / 1024 for value in _numbers(rows, key)], 0.25, color=colour, label=label)
    sizes.set_title(f"One exchange on {report.machine['ranks']} ranks")
    sizes.set_xlabel("KiB, all ranks")
    for number, (key, colour, label) in enumerate(
        (("us", MODEL_COLOUR, "exchange"), ("us back", _THIRD, "transposed exchange"))
    ):
        places = [place + (number - 0.5) * _BAR for place in range(len(rows))]
        times.barh(places, [value / 1e3 for value in _numbers(rows, key)], 0.95 * _BAR, color=colour, label=label)
    times.set_title("Its time, slowest rank")
    times.set_xlabel("milliseconds, median")
    _named(sizes, names)
    times.grid(axis="x", alpha=0.25)
    times.set_axisbelow(True)
    times.tick_params(axis="y", length=0)
    # Room for the legends below the bars.
    sizes.set_ylim(len(rows) + 0.1, -0.6)
    for axis in (sizes, times):
        axis.legend(loc="lower right", ncols=3, fontsize=9)


def _scaling(figure: Figure, report: Report) -> None:
    """Draw the measurements as bars, and the strong and weak scaling of the model to many ranks."""
    measured = [row for row in report.rows if not str(row["what"]).startswith("projected") and row["what"] != "weak"]
    projected = [row for row in report.rows if str(row["what"]).startswith("projected")]
    if projected:
        bars, speed, time = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        _draw_strong(speed, report)
        _draw_weak(time, report)
    else:
        bars = figure.subplots()
    left = [0.0] * len(measured)
    for key, colour, label in (
        ("work", MODEL_COLOUR, "work and waiting"),
        ("halo", _THIRD, "halo exchanges"),
        ("sum", _OTHER, "gradient sum"),
    ):
        values = [value if math.isfinite(value) else 0.0 for value in _numbers(measured, key)]
        bars.barh(range(len(measured)), values, left=left, color=colour, label=label)
        left = [start + value for start, value in zip(left, values, strict=True)]
    seconds = _numbers(measured, "seconds")
    peers = [value if row["what"] != "strong" else 0.0 for row, value in zip(measured, seconds, strict=True)]
    bars.barh(range(len(measured)), peers, color=_WORK)
    counts = [f"{row['ranks']} rank{'s' * (int(row['ranks']) > 1)}" for row in measured]
    called = {"strong": "{}", "no messages": "{}, no messages"}
    _named(
        bars,
        [called.get(str(row["what"]), str(row["what"])).format(n) for row, n in zip(measured, counts, strict=True)],
    )
    _written(bars, _numbers(measured, "speed-up"), seconds, "{:.2f} x")
    bars.set_title(f"One training step, {report.rows[0]['grid']} points")
    bars.set_xlabel("seconds; times as fast as one rank")
    bars.set_xlim(0, 1.18 * max(seconds))
    # Room for the legend below the bars.
    bars.set_ylim(len(measured) + 0.1, -0.6)
    bars.legend(loc="lower center", ncols=3, fontsize=9, columnspacing=0.9)


def _of(report: Report, what: str) -> list[Row]:
    return [row for row in report.rows if row["what"] == what]


def _draw_strong(axis: Axes, report: Report) -> None:
    measured, projected = _of(report, "strong"), _of(report, "projected strong")
    ranks, seconds = _modelled(measured, projected)
    axis.plot(ranks, ranks, color=_LIMIT, linestyle=":", label="ideal")
    single = float(measured[0]["seconds"])
    axis.plot(ranks, [single / each for each in seconds], color=_THIRD, marker="o", markersize=4, label="model")
    _mark(axis, measured, "speed-up")
    axis.set_yscale("log", base=2)
    axis.set_ylabel("times as fast as one rank")
    axis.set_title(f"Strong scaling, {projected[0]['grid']}")
    _many_ranks(axis)


def _draw_weak(axis: Axes, report: Report) -> None:
    measured, projected = _of(report, "weak"), _of(report, "projected weak")
    ranks, seconds = _modelled(measured, projected)
    axis.axhline(1.0, color=_LIMIT, linestyle=":", label="ideal")
    single = float(measured[0]["seconds"])
    axis.plot(ranks, [single / each for each in seconds], color=_THIRD, marker="o", markersize=4, label="model")
    _mark(axis, measured, "efficiency")
    axis.set_ylim(0, 1.15)
    axis.set_ylabel("efficiency")
    axis.set_title(f"Weak scaling, {measured[0]['grid']} a rank")
    _many_ranks(axis)


def _modelled(measured: Sequence[Row], projected: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Return ranks and seconds of the model, within and beyond the measured ranks."""
    most = float(measured[-1]["ranks"])
    rows = [*measured, *(row for row in projected if float(row["ranks"]) > most)]
    return _numbers(rows, "ranks"), _numbers(rows, "predicted")


def _mark(axis: Axes, measured: Sequence[Row], key: str) -> None:
    values = _numbers(measured, key)
    axis.plot(_numbers(measured, "ranks"), values, "s", color=MODEL_COLOUR, label="measured", zorder=3)


def _many_ranks(axis: Axes) -> None:
    axis.set_xscale("log", base=2)
    for scale in (axis.xaxis, axis.yaxis):
        if scale.get_scale() == "log":
            scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("ranks")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)


def _precision(figure: Figure, report: Report) -> None:
    """Draw seconds and gradient errors by the dtype of f."""
    rows = report.rows
    seconds, errors = figure.subplots(1, 2, sharey=True)
    names = [str(row["f in"]) for row in rows]
    times = _numbers(rows, "seconds")
    seconds.barh(range(len(rows)), times, color=MODEL_COLOUR)
    _written(seconds, _numbers(rows, "times as fast"), times, "{:.1f} x as fast")
    seconds.set_xlim(0, 1.3 * max(times))
    seconds.set_xlabel("seconds")
    seconds.set_title(f"Loss and gradient, {rows[0]['grid']} points")
    _named(seconds, names)
    found = _numbers(rows, "gradient error")
    errors.barh(range(len(rows)), found, color=_OTHER)
    errors.set_xscale("log")
    least = min(value for value in found if value > 0)
    errors.set_xlim(least / 10, 10 * max(found))
    _written(errors, [value or math.nan for value in found], found, "{:.1e}")
    errors.set_xlabel("relative to the gradient in float64")
    errors.set_title("Error of the gradient")
    errors.grid(axis="x", alpha=0.25)
    errors.set_axisbelow(True)
    errors.tick_params(axis="y", length=0)


def _sync(figure: Figure, report: Report) -> None:
    """Draw the seconds of a gradient sum with each backend."""
    rows = report.rows
    axis = figure.subplots()
    for number, (backend, colour) in enumerate((("mpi", MODEL_COLOUR), ("gloo", _OTHER))):
        places = [place + (number - 0.5) * _BAR for place in range(len(rows))]
        values = [1e3 * value for value in _numbers(rows, backend)]
        axis.barh(places, values, 0.95 * _BAR, color=colour, label=backend)
        _written(axis, values, values, "{:.3g}", (number - 0.5) * _BAR)
    axis.set_xscale("log")
    found = [1e3 * value for backend in ("mpi", "gloo") for value in _numbers(rows, backend)]
    axis.set_xlim(min(found) / 4, 4 * max(found))
    axis.set_xlabel("milliseconds, median, slowest rank")
    axis.set_title(f"A backward pass that sums gradients over {report.machine['ranks']} ranks")
    _named(axis, [f"{int(row['floats']):,} floats" for row in rows])
    axis.legend(fontsize=9)


def _peers(figure: Figure, report: Report) -> None:
    """Draw the time of a gradient, and of the forward pass alone, with a panel for each case."""
    cases = list(dict.fromkeys(str(row["case"]) for row in report.rows))
    panels = figure.subplots(math.ceil(len(cases) / 2), 2, squeeze=False).flat
    for axis, case in zip(panels, cases, strict=False):
        rows = [row for row in report.rows if row["case"] == case]
        gradients, forward = _numbers(rows, "gradient"), _numbers(rows, "forward")
        colours = [MODEL_COLOUR if str(row["solver"]).startswith("pnode_dist") else _OTHER for row in rows]
        axis.barh(range(len(rows)), gradients, color=colours, label="a gradient")
        axis.barh(range(len(rows)), forward, 0.3, color=_WORK, label="forward alone")
        _named(axis, [str(row["solver"]) for row in rows])
        _written(axis, gradients, gradients, "{:.3g}")
        axis.set_xlim(0, 1.15 * max(*gradients, *forward))
        axis.set_title(case)
        axis.set_xlabel("milliseconds of processor time, median")
    for axis in list(panels):
        axis.set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)


DRAWINGS: dict[str, tuple[Callable[[Figure, Report], Any], tuple[float, float]]] = {
    "halo": (_halo, (12.0, 5.6)),
    "methods": (draw_methods, (17.0, 12.0)),
    "overhead": (_overhead, (14.0, 7.5)),
    "peers": (_peers, (14.0, 15.0)),
    "precision": (_precision, (10.0, 3.4)),
    "scaling": (_scaling, (15.0, 4.6)),
    "sync": (_sync, (8.0, 3.0)),
}
