"""The picture of a run: that it is drawn from whatever a run leaves, in the promised size."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import image

from pnode_dist import Mesh
from pnode_dist.problems.field.plots import draw_report
from pnode_dist.problems.field.problem import build_field
from tests.unit.problems.field.synthetic_fields import TIMES, config, dataset, values, write

HEIGHT, WIDTH = 1032, 1440


def evaluated(directory: Path, mesh: Mesh, data: Any, **tables: Any) -> dict[str, Any]:
    problem = build_field(config(write(directory / "f.nc", data), **tables), mesh, torch.float64)
    with torch.no_grad():
        return problem.evaluate(problem.model, directory)


def draw(directory: Path, table: dict[str, Any]) -> np.ndarray[Any, Any]:
    draw_report(directory / "r.png", directory / "forecast.h5", directory / "metrics.jsonl", table)
    return np.asarray(image.imread(directory / "r.png"))


def metrics(directory: Path, losses: list[float | None], validations: int) -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "step", "step": step, "epoch": (step + 1) // 2, "loss": loss} for step, loss in enumerate(losses, 1)
    ]
    lines += [
        {"kind": "validation", "step": 2 * epoch, "epoch": epoch, "figures": {"validation_rmse": 1.0 / epoch}}
        for epoch in range(1, validations + 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def colourful(picture: np.ndarray[Any, Any]) -> float:
    """The share of pixels that are not grey, white or black."""
    return float((np.ptp(picture[..., :3], axis=-1) > 0.1).mean())


def test_the_picture_has_its_size_and_maps_in_colour(tmp_path: Path, mesh: Mesh) -> None:
    metrics(tmp_path, [4.0, 3.0, 2.0, 1.5, 1.2, 1.1], validations=3)
    picture = draw(tmp_path, evaluated(tmp_path, mesh, dataset(values())))
    assert picture.shape[:2] == (HEIGHT, WIDTH)
    assert colourful(picture) > 0.25


def test_the_training_panel_shows_the_losses(tmp_path: Path, mesh: Mesh) -> None:
    table = evaluated(tmp_path, mesh, dataset(values()))
    without = draw(tmp_path, table)
    pictures = []
    several: list[list[float | None]] = [[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, None, 1.0], [400.0, 3.0, 2.0, 1.0]]
    for losses in several:
        metrics(tmp_path, losses, validations=2)
        pictures.append(draw(tmp_path, table))
    panel = (slice(640, None), slice(0, 640))
    for number, picture in enumerate(pictures):
        others = [without, *pictures[:number]]
        assert all((picture[panel] != other[panel]).any() for other in others)


@pytest.mark.parametrize("leads", [(1,), (1, 2), (2, 6)])
def test_any_leads_can_be_drawn(tmp_path: Path, mesh: Mesh, leads: tuple[int, ...]) -> None:
    table = evaluated(tmp_path, mesh, dataset(values()), evaluation={"leads": leads})
    assert draw(tmp_path, table).shape[:2] == (HEIGHT, WIDTH)


def test_fields_with_channels_and_numbers_for_times_can_be_drawn(tmp_path: Path, mesh: Mesh) -> None:
    data = dataset(values(channels=2), np.arange(TIMES))
    data.sst.attrs.clear()
    table = evaluated(tmp_path, mesh, data, model={"harmonics": 0})
    assert colourful(draw(tmp_path, table)) > 0.25


def test_drawing_leaves_the_style_of_other_pictures_alone(tmp_path: Path, mesh: Mesh) -> None:
    before = dict(matplotlib.rcParams)
    draw(tmp_path, evaluated(tmp_path, mesh, dataset(values())))
    assert dict(matplotlib.rcParams) == before
