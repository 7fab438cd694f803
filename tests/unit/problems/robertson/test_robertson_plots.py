"""The picture of a Robertson run: that it is drawn from whatever rollouts and metrics there are, in one size."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import image

from pnode_dist import Mesh
from pnode_dist.problems.robertson.plots import draw_report
from pnode_dist.report.dataset_file import Variable, write_dataset

HEIGHT, WIDTH = 984, 1560
TIMES, TRAJECTORIES = 9, 5
PANELS = {
    "species": (slice(0, HEIGHT // 2), slice(0, WIDTH)),
    "training": (slice(HEIGHT // 2, None), slice(0, WIDTH // 3)),
    "errors": (slice(HEIGHT // 2, None), slice(WIDTH // 2 - 60, WIDTH * 2 // 3)),
    "steps": (slice(HEIGHT // 2, None), slice(WIDTH * 3 // 4, None)),
}


def draw(
    directory: Path, mesh: Mesh, error: float = 0.1, reached: int = 6, trajectories: int = TRAJECTORIES
) -> np.ndarray[Any, Any]:
    """The picture of random trajectories, of rollouts that lie `error` beside them, and of a rival that got so far."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(TIMES, trajectories, 3, generator=generator, dtype=torch.float64)
    forecast = truth + error
    forecast[0] = truth[0]
    rival = forecast.clone()
    rival[reached + 1 :] = math.nan
    steps = np.arange(TIMES, dtype=float)
    rollouts = {
        "truth": truth,
        "forecast": forecast,
        "persistence": truth[:1].expand_as(truth),
        "training_mean": torch.full_like(truth, 0.5),
        "rival": rival,
    }
    series = {
        "time": np.logspace(-5, 2, TIMES),
        "steps_as_trained": steps,
        "steps_fine_steps": 16 * steps,
        "steps_rival": np.where(steps <= reached, 50 * steps**2, math.nan),
    }
    variables = {name: Variable(("time", "trajectory", "component"), values) for name, values in rollouts.items()}
    variables |= {name: Variable(("time",), values) for name, values in series.items()}
    variables["component"] = Variable(("component",), np.array(["A", "B", "C"]))
    variables["scale"] = Variable(("component",), np.ones(3))
    write_dataset(directory / "f.h5", variables, mesh)
    draw_report(directory / "r.png", directory / "f.h5", directory / "metrics.jsonl", {})
    return np.asarray(image.imread(directory / "r.png"))


def changed(before: Any, after: Any) -> set[str]:
    """The panels in which two pictures differ."""
    return {name for name, panel in PANELS.items() if (before[panel] != after[panel]).any()}


def test_each_panel_shows_what_it_is_for(tmp_path: Path, mesh: Mesh) -> None:
    before = draw(tmp_path, mesh)
    assert changed(before, draw(tmp_path, mesh)) == set()
    assert {"species", "errors"} <= changed(before, draw(tmp_path, mesh, error=0.2))
    assert "steps" in changed(before, draw(tmp_path, mesh, reached=5))
    lines = [{"kind": "step", "step": step, "epoch": 1, "loss": 1.0 / step} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "training" in changed(before, draw(tmp_path, mesh))


def test_drawing_leaves_the_style_of_other_pictures_alone(tmp_path: Path, mesh: Mesh) -> None:
    before = dict(matplotlib.rcParams)
    draw(tmp_path, mesh)
    assert dict(matplotlib.rcParams) == before
