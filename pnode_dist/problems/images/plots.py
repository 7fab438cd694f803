"""Plot of an images run: training curves, the confusion matrix, and misclassified images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from pnode_dist.report.panels import MODEL_COLOUR, Array, draw_training, report_figure

_SIZE = (13.0, 8.6)
_SHOWN = 12
_COLOURS = "Blues"


def draw_report(path: Path, forecast: Path, metrics_file: Path, result: Mapping[str, Any]) -> None:
    """Draw `report.png` from the forecast file and the metrics file if present. Call on one rank."""
    with report_figure(path, forecast, _SIZE) as (figure, file):
        labels, probabilities, images = (file[name][:] for name in ("label", "probability", "image"))
        classes = [name.decode() for name in file["class"][:]]
        (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.9, 1))
        training, confusion = above.subplots(1, 2, width_ratios=(1.15, 1))
        draw_training(training, metrics_file, "", "cross entropy (nats)", f"{result['watched']} error")
        taken = probabilities.argmax(axis=1)
        _draw_confusion(confusion, labels, taken, classes)
        _draw_missed(below, images, labels, probabilities, classes)
        right = int((labels == taken).sum())
        figure.suptitle(
            f"Images told apart: {right} of {len(labels)} test images are taken for what they are "
            f"({100 * right / len(labels):.2f} %)",
            fontsize=12,
        )


def _draw_confusion(axis: Axes, labels: Array, taken: Array, classes: list[str]) -> None:
    """Draw the confusion matrix: images of a class in each row, counted by predicted class, coloured by their share."""
    counts = np.zeros(2 * (len(classes),), dtype=int)
    np.add.at(counts, (labels, taken), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Keep the few misclassified images visible beside the many correct ones.
    axis.imshow(np.sqrt(shares), cmap=_COLOURS, vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        shade = "white" if shares[row, column] > 0.4 else "black"
        axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=shade, fontsize=9)
    recalls = [f"{name}  {100 * share:.1f} %" for name, share in zip(classes, shares.diagonal(), strict=True)]
    axis.set_xticks(range(len(classes)), classes, rotation=0 if max(map(len, classes)) < 3 else 60)
    axis.set_yticks(range(len(classes)), recalls)
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_title("Test images by class, and what they are taken for")
    axis.set_xlabel("taken for")
    axis.set_ylabel("class, and the share that is found")


def _draw_missed(panel: SubFigure, images: Array, labels: Array, probabilities: Array, classes: list[str]) -> None:
    """Draw the misclassified images with the highest predicted probability."""
    taken = probabilities.argmax(axis=1)
    missed = np.flatnonzero(taken != labels)
    missed = missed[np.argsort(-probabilities[missed, taken[missed]], kind="stable")][:_SHOWN]
    axes = panel.subplots(1, _SHOWN)
    for axis in axes:
        axis.set_axis_off()
    for axis, number in zip(axes, missed, strict=False):
        image = images[number]
        one = image[..., 0] if image.shape[-1] == 1 else image
        axis.imshow(one, cmap="gray_r", vmin=0, vmax=images.max(), interpolation="nearest")
        axis.set_title(
            f"{classes[labels[number]]}\ntaken for {classes[taken[number]]}\n"
            f"({100 * probabilities[number, taken[number]]:.0f} %)",
            fontsize=8.5,
            loc="center",
            fontweight="normal",
            color=MODEL_COLOUR,
        )
    shown = f"The {len(missed)} missed images of which the network was surest" if len(missed) else "No image is missed"
    panel.suptitle(shown, fontsize=11, fontweight="bold", x=0.01, ha="left")
