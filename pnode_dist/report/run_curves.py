"""Curves of a run's page: losses, validation and the cost of steps, drawn from the metrics file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from pnode_dist.report.panels import MODEL_COLOUR, STYLE

Array = npt.NDArray[np.float64]

_SIZE = (6.4, 3.2)
_MOST_POINTS = 1500
_COLOURS = (MODEL_COLOUR, "#1f78b4", "#4d8f3a", "#e08a1e", "#7b5ea7", "#5b6770")
_DECADES = 20.0
_MEBIBYTE = 2.0**20


@dataclass(frozen=True)
class Curve:
    """One line of a plot: a name, positions, and values."""

    name: str
    at: Array
    values: Array


@dataclass(frozen=True)
class Picture:
    """Curves over a common axis."""

    title: str
    across: str
    upward: str
    curves: tuple[Curve, ...]


def pictures(records: Sequence[dict[str, Any]]) -> list[Picture]:
    """Return the plots that the records of a metrics file allow, in the order of the page."""
    steps = [record for record in records if record["kind"] == "step"]
    checks = [record for record in records if record["kind"] == "validation"]
    iterations = [record for record in records if record["kind"] == "iteration"]
    found = []
    if iterations:
        found += [
            _of_iterations(iterations, "Minimisation", "J", "value"),
            _of_iterations(iterations, "Gradient", "norm", "gradient_norm"),
        ]
    if steps:
        found += [
            _of_steps(steps, "Loss", "loss of a batch", {"loss": "loss"}),
            _of_steps(steps, "Gradient", "norm before clipping", {"gradient norm": "gradient_norm"}),
            _of_steps(steps, "Learning rate", "learning rate", {"learning rate": "learning_rate"}),
        ]
    if checks:
        found.append(_validation(checks))
    if steps:
        found += [_pace(steps), _work(steps)]
        found.append(_of_steps(steps, "Memory", "largest rank, MiB", {"peak memory": "peak_memory"}, 1 / _MEBIBYTE))
        if any(step["bytes_written"] or step["bytes_read"] for step in steps):
            traffic = {"written": "bytes_written", "read": "bytes_read"}
            found.append(_of_steps(steps, "Checkpoints on disk", "all ranks, MiB a step", traffic, 1 / _MEBIBYTE))
    return [picture for picture in found if any(len(curve.at) for curve in picture.curves)]


def _validation(checks: Sequence[dict[str, Any]]) -> Picture:
    """Return the main validation value, and further values up to the number of colours."""
    unit = checks[0]["units"]
    curves = tuple(
        _curve(name.replace("_", " "), checks, [check["figures"].get(name) for check in checks], "step")
        for name in list(checks[0]["figures"])[: len(_COLOURS)]
    )
    return Picture("Validation", "optimiser step", f"error ({unit})" if unit else "error", curves)


def _of_steps(
    steps: Sequence[dict[str, Any]], title: str, upward: str, names: dict[str, str], factor: float = 1.0
) -> Picture:
    curves = tuple(
        _curve(label, steps, [step.get(key) for step in steps], "step", factor) for label, key in names.items()
    )
    return Picture(title, "optimiser step", upward, curves)


def _of_iterations(iterations: Sequence[dict[str, Any]], title: str, upward: str, key: str) -> Picture:
    curve = _curve(upward, iterations, [record[key] for record in iterations], "iteration")
    return Picture(title, "iteration", upward, (curve,))


def _curve(
    name: str, records: Sequence[dict[str, Any]], values: Sequence[float | None], at: str, factor: float = 1.0
) -> Curve:
    """Return a curve of the records that have a value. Non-finite numbers are null in the file."""
    pairs = [(record[at], value * factor) for record, value in zip(records, values, strict=True) if value is not None]
    where, what = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return Curve(name, where, what)


def _pace(steps: Sequence[dict[str, Any]]) -> Picture:
    """Return the seconds from the end of one optimiser step to the end of the next, including validation in between."""
    times = np.array([step["wall_time"] for step in steps])
    numbers = np.array([step["step"] for step in steps], dtype=np.float64)
    taken = np.diff(times, prepend=0.0)
    # A resumed run restarts its clock.
    goes_on = taken >= 0
    return Picture(
        "Pace", "optimiser step", "seconds a step", (Curve("seconds a step", numbers[goes_on], taken[goes_on]),)
    )


def _work(steps: Sequence[dict[str, Any]]) -> Picture:
    names = {"forward": "forward_steps", "recomputed": "recomputed_steps", "adjoint": "adjoint_steps"}
    return _of_steps(steps, "Time steps", "time steps an optimiser step", names)


def as_svg(picture: Picture) -> bytes:
    """Return the plot as an SVG document."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axis = figure.add_subplot()
        axis.set_title(picture.title)
        for curve, colour in zip(picture.curves, _COLOURS, strict=False):
            at, values = _thinned(curve)
            axis.plot(at, values, color=colour, linewidth=1.4, marker="o" if len(at) < 40 else None, markersize=3)
        values = np.concatenate([curve.values for curve in picture.curves])
        if values.min() > 0 and values.max() > _DECADES * values.min():
            axis.set_yscale("log")
        elif values.min() >= 0:
            axis.set_ylim(0, 1.1 * values.max() or 1)
        axis.set_xlabel(picture.across)
        axis.set_ylabel(picture.upward)
        axis.grid(alpha=0.25)
        if len(picture.curves) > 1:
            axis.legend([curve.name for curve in picture.curves], fontsize=9)
        written = io.BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
        return written.getvalue()


def _thinned(curve: Curve) -> tuple[Array, Array]:
    """Reduce a curve to a limited number of points, each the mean of consecutive points, to keep the page small."""
    if len(curve.at) <= _MOST_POINTS:
        return curve.at, curve.values
    at, values = (np.array_split(array, _MOST_POINTS) for array in (curve.at, curve.values))
    return np.array([part.mean() for part in at]), np.array([part.mean() for part in values])
