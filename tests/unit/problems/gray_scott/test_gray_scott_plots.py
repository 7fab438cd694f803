"""The picture of a Gray-Scott run: that it is drawn from whatever rollouts and metrics there are, in one size."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import image

from pnode_dist import Mesh
from pnode_dist.problems.gray_scott.plots import draw_report
from pnode_dist.report.dataset_file import Variable, write_dataset

HEIGHT, WIDTH = 1128, 1440
NY, NX = 12, 9


def draw(directory: Path, mesh: Mesh, times: int = 8, largest_error: float = 0.1) -> np.ndarray[Any, Any]:
    """The picture of random trajectories and of rollouts that lie up to `largest_error` beside them."""
    generator = np.random.default_rng(0)
    truth = torch.from_numpy(generator.uniform(0, 1, (2, times, NY, NX, 2)))
    error = largest_error * torch.from_numpy(generator.uniform(-1, 1, truth.shape))
    error[:, 0] = 0
    dimensions = ("trajectory", "time", "y", "x", "species")
    variables = {
        "time": Variable(("time",), 2.0 * np.arange(times)),
        "y": Variable(("y",), np.arange(NY) / NY),
        "x": Variable(("x",), 2.0 * np.arange(NX) / NX),
        "truth": Variable(dimensions, truth),
        "forecast": Variable(dimensions, truth + error),
        "training_mean": Variable(("species",), np.array([0.5, 0.5])),
    }
    write_dataset(directory / "f.h5", variables, mesh)
    draw_report(directory / "r.png", directory / "f.h5", directory / "metrics.jsonl", {})
    return np.asarray(image.imread(directory / "r.png"))


@pytest.mark.parametrize(("times", "largest_error"), [(2, 0.0), (3, 1e6), (8, 0.1)])
def test_any_number_of_samples_and_any_error_can_be_drawn(
    tmp_path: Path, mesh: Mesh, times: int, largest_error: float
) -> None:
    picture = draw(tmp_path, mesh, times, largest_error)
    assert picture.shape[:2] == (HEIGHT, WIDTH)
    assert (np.ptp(picture[..., :3], axis=-1) > 0.1).mean() > 0.05


def test_the_training_panel_shows_the_losses(tmp_path: Path, mesh: Mesh) -> None:
    without = draw(tmp_path, mesh)
    lines = [{"kind": "step", "step": step, "epoch": 1, "loss": 1.0 / step} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panel = (slice(HEIGHT * 2 // 3, None), slice(0, WIDTH // 2))
    assert (draw(tmp_path, mesh)[panel] != without[panel]).any()


def test_the_error_panel_shows_the_rollouts_errors(tmp_path: Path, mesh: Mesh) -> None:
    panel = (slice(HEIGHT * 2 // 3, None), slice(WIDTH // 2, None))
    assert (draw(tmp_path, mesh, largest_error=0.1)[panel] != draw(tmp_path, mesh, largest_error=0.2)[panel]).any()


def test_drawing_leaves_the_style_of_other_pictures_alone(tmp_path: Path, mesh: Mesh) -> None:
    before = dict(matplotlib.rcParams)
    draw(tmp_path, mesh)
    assert dict(matplotlib.rcParams) == before
