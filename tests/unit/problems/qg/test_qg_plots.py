"""The picture and the film of a quasi-geostrophic run: drawn from whatever there is, and what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import image
from PIL import Image

from pnode_dist import Mesh
from pnode_dist.problems.qg import animation
from pnode_dist.problems.qg.animation import draw_animation
from pnode_dist.problems.qg.config import EDDY
from pnode_dist.problems.qg.evaluation import Run, evaluation_of
from pnode_dist.problems.qg.plots import draw_report
from pnode_dist.report.dataset_file import Variable, write_dataset
from tests.unit.problems.qg.test_qg_evaluation import POINTS, TIMES, runs

TABLE = {"configuration": "eddy", "grid": [POINTS, POINTS], "fine_grid": [64, 64]}


def file_of(path: Path, mesh: Mesh, given: dict[str, Run] | None) -> dict[str, Any]:
    """Write a forecast file, with long runs if any. Returns evaluate's table."""
    random = np.random.default_rng(0)
    axes = ("trajectory", "time", "y", "x", "layer")
    truth = 1e-5 * random.standard_normal((2, 5, POINTS, POINTS, 2))
    variables = {
        "time": Variable(("time",), 12.0 * np.arange(5)),
        "layer": Variable(("layer",), np.array(["upper", "lower"])),
        "truth": Variable(axes, truth),
        "forecast": Variable(axes, 0.9 * truth),
        "no_closure": Variable(axes, 0.5 * truth),
        "persistence": Variable(axes, np.broadcast_to(truth[:, :1], truth.shape)),
    }
    result: dict[str, Any] = dict(TABLE)
    if given is not None:
        figures, found = evaluation_of(given, EDDY, 0.5)
        result |= figures
        states = torch.full((len(given), TIMES, POINTS, POINTS, 2), torch.nan)
        for number, run in enumerate(given.values()):
            q = run.q if run.q.ndim == 4 else run.q[0]
            states[number, : len(q)] = torch.from_numpy(q)
        found["free_run_q"] = Variable(("free_run", "sample", "y", "x", "layer"), states)
        variables |= found
    write_dataset(path, variables, mesh)
    return result


def draw(directory: Path, mesh: Mesh, given: dict[str, Run] | None) -> Any:
    result = file_of(directory / "f.h5", mesh, given)
    draw_report(directory / "r.png", directory / "f.h5", directory / "metrics.jsonl", result)
    return np.asarray(image.imread(directory / "r.png"))


def coloured(picture: Any) -> float:
    """The share of the points that are not grey."""
    return float((np.ptp(picture[..., :3], axis=-1) > 0.1).mean())


def test_forecasts_are_drawn_without_long_runs(tmp_path: Path, mesh: Mesh) -> None:
    picture = draw(tmp_path, mesh, None)
    assert picture.shape[:2] == (1032, 1680)
    assert coloured(picture) > 0.05


@pytest.mark.slow
def test_long_runs_their_statistics_and_scores_are_drawn(tmp_path: Path, mesh: Mesh) -> None:
    before = dict(matplotlib.rcParams)
    picture = draw(tmp_path, mesh, runs())
    assert picture.shape[:2] == (1680, 1680)
    assert coloured(picture) > 0.05
    assert dict(matplotlib.rcParams) == before
    # Another run of the model changes maps, statistics, scores and energies.
    other = runs()
    other["model"] = Run(1.3 * other["model"].q, other["model"].forcing)
    changed = (draw(tmp_path, mesh, other) != picture).any(axis=(1, 2))
    assert all(part.any() for part in np.array_split(changed[: 4 * len(changed) // 5], 3))


@pytest.mark.slow
def test_runs_without_scores_are_drawn(tmp_path: Path, mesh: Mesh) -> None:
    given = runs()
    given["no_closure"] = Run(given["no_closure"].q[:1], None, 0.5)
    assert coloured(draw(tmp_path, mesh, given)) > 0.03


def frames(path: Path) -> list[Any]:
    with Image.open(path) as film:
        count = getattr(film, "n_frames", 1)
        found = []
        for number in range(count):
            film.seek(number)
            found.append(np.asarray(film.convert("RGB")))
        return found


def test_the_film_has_a_frame_for_each_sample_of_the_truth(tmp_path: Path, mesh: Mesh) -> None:
    given = runs()
    given["model"] = Run(given["model"].q[:2], None, 1.0)
    file_of(tmp_path / "f.h5", mesh, given)
    draw_animation(tmp_path / "f.gif", tmp_path / "f.h5")
    found = frames(tmp_path / "f.gif")
    assert len(found) == TIMES
    width = found[0].shape[1]
    left, right = slice(0, width // 3), slice(2 * width // 3, None)
    # Below the title, which has the day.
    assert (found[3][80:, left] != found[2][80:, left]).any()
    # The model blew up after its second sample.
    assert (found[1][80:, right] != found[0][80:, right]).any()
    assert not (found[3][80:, right] != found[2][80:, right]).any()


def test_a_film_that_is_too_large_loses_frames(tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    file_of(tmp_path / "f.h5", mesh, runs())
    monkeypatch.setattr(animation, "_LARGEST_FILE", 1000)
    draw_animation(tmp_path / "f.gif", tmp_path / "f.h5")
    assert len(frames(tmp_path / "f.gif")) == 2
