"""The picture of an images run: that it is drawn from whatever predictions and metrics there are, in one size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from pnode_dist import Mesh
from pnode_dist.problems.images.plots import draw_report
from pnode_dist.report.dataset_file import Variable, write_dataset

HEIGHT, WIDTH = 1032, 1560
PANELS = {
    "training": (slice(60, HEIGHT * 3 // 5), slice(0, WIDTH // 2 - 60)),
    "confusion": (slice(60, HEIGHT * 3 // 5), slice(WIDTH // 2, None)),
    "missed": (slice(HEIGHT * 2 // 3, None), slice(0, WIDTH)),
}


def draw(directory: Path, mesh: Mesh, taken: list[int], channels: int = 1, shade: int = 40) -> np.ndarray[Any, Any]:
    """The picture of five images of three classes, of which the first are taken for `taken`."""
    labels = np.array([0, 1, 2, 1, 0])
    found = np.array([*taken, *labels[len(taken) :]])
    probabilities = np.full((5, 3), 0.1)
    probabilities[np.arange(5), found] = 0.8
    images = np.full((5, 4, 4, channels), shade, dtype=np.uint8)
    images[:, 1, 2] = 250
    variables = {
        "image": Variable(("sample", "y", "x", "channel"), images),
        "label": Variable(("sample",), labels),
        "probability": Variable(("sample", "class"), probabilities),
        "class": Variable(("class",), np.array(["one", "two", "three"])),
    }
    write_dataset(directory / "f.h5", variables, mesh)
    draw_report(directory / "r.png", directory / "f.h5", directory / "metrics.jsonl", {"watched": "validation"})
    return np.asarray(image.imread(directory / "r.png"))


def changed(before: Any, after: Any) -> set[str]:
    """The panels in which two pictures differ."""
    return {name for name, panel in PANELS.items() if (before[panel] != after[panel]).any()}


def test_each_panel_shows_what_it_is_for(tmp_path: Path, mesh: Mesh) -> None:
    before = draw(tmp_path, mesh, [1])
    assert before.shape[:2] == (HEIGHT, WIDTH)
    assert changed(before, draw(tmp_path, mesh, [1])) == set()
    assert {"confusion", "missed"} <= changed(before, draw(tmp_path, mesh, [2]))
    assert changed(before, draw(tmp_path, mesh, [1], shade=200)) == {"missed"}
    lines = [{"kind": "step", "step": step, "epoch": 1, "loss": 1.0 / step} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "training" in changed(before, draw(tmp_path, mesh, [1]))


@pytest.mark.parametrize("taken", [[], [1, 2, 0, 0, 1]], ids=["none missed", "all missed"])
def test_colours_and_any_number_of_missed_images_are_drawn(tmp_path: Path, mesh: Mesh, taken: list[int]) -> None:
    before = dict(matplotlib.rcParams)
    assert draw(tmp_path, mesh, taken, channels=3).shape[:2] == (HEIGHT, WIDTH)
    assert dict(matplotlib.rcParams) == before
