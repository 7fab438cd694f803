"""A film of long quasi-geostrophic runs side by side, as a GIF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pnode_dist.problems.qg.plots import RUNS, largest_value, names_of
from pnode_dist.report.panels import STYLE

_SHOWN = ("truth", "no_closure", "model")
_FRAMES, _COLOURS, _MILLISECONDS = 60, 64, 120
_LARGEST_FILE = 2_000_000


def draw_animation(path: Path, forecast: Path) -> None:
    """Write the upper layer's potential vorticity of truth, model and run without closure as a GIF of at most 2 MB.

    `forecast` is the file with the long runs. The film ends with the truth, or with the longest of the others. A run
    that blew up keeps its last finite state. Frames are left out evenly where there are many, or where the file would
    be larger. Call on one rank.
    """
    with h5py.File(forecast, "r") as file:
        names = [name for name in _SHOWN if name in names_of(file)]
        places = [names_of(file).index(name) for name in names]
        states = [_held(file["free_run_q"][place, ..., 0]) for place in places]
        days = file["sample_time"][:]
        lengths = [int(np.isfinite(file["free_run_q"][place, :, 0, 0, 0]).sum()) for place in places]
    samples = min(lengths[0], max(lengths[1:], default=lengths[0]))
    count = min(_FRAMES, samples)
    while True:
        chosen = np.unique(np.linspace(0, samples - 1, count).round().astype(int))
        frames = _frames(names, [values[chosen] for values in states], days[chosen])
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=_MILLISECONDS, loop=0)
        if path.stat().st_size <= _LARGEST_FILE or count <= 2:
            return
        count //= 2


def _held(values: Any) -> Any:
    """Return states `[time, y, x]` with each that is missing replaced by the one before it."""
    finite = np.isfinite(values).all(axis=(1, 2))
    return values[np.maximum.accumulate(np.where(finite, np.arange(len(values)), 0))]


def _frames(names: list[str], states: list[Any], days: Any) -> list[Image.Image]:
    """Return the pictures, in the colours of the first one."""
    largest = largest_value(states[0])
    pictures: list[Image.Image] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.0 * len(names), 3.3), dpi=80, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(names), squeeze=False)[0]
        images = [
            axis.imshow(values[0], origin="lower", interpolation="nearest", cmap="RdBu_r", vmin=-largest, vmax=largest)
            for axis, values in zip(axes, states, strict=True)
        ]
        for axis, name in zip(axes, names, strict=True):
            axis.set(xticks=[], yticks=[], title=RUNS[name]["label"])
        title = figure.suptitle("")
        for frame, day in enumerate(days):
            title.set_text(f"potential vorticity of the upper layer, day {day:.1f}")
            for image, values in zip(images, states, strict=True):
                image.set_data(values[frame])
            canvas.draw()  # type: ignore[no-untyped-call]
            pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
            drawn = Image.fromarray(pixels[..., :3])
            if pictures:
                pictures.append(drawn.quantize(palette=pictures[0], dither=Image.Dither.NONE))
            else:
                pictures.append(drawn.quantize(_COLOURS, dither=Image.Dither.NONE))
    return pictures
