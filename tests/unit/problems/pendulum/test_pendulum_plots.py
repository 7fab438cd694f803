"""The picture of a pendulum run: that it is drawn from whatever rollouts and metrics there are, in one size."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import image

from pnode_dist import Mesh
from pnode_dist.problems.pendulum.config import PendulumParameters
from pnode_dist.problems.pendulum.physics import states
from pnode_dist.problems.pendulum.plots import draw_report
from pnode_dist.report.dataset_file import Variable, write_dataset

HEIGHT, WIDTH = 984, 1560
TIMES, TRAJECTORIES = 9, 4
PANELS = {
    "components": (slice(0, HEIGHT // 2), slice(0, WIDTH)),
    "training": (slice(HEIGHT // 2, None), slice(0, WIDTH // 3)),
    "errors": (slice(HEIGHT // 2, None), slice(WIDTH // 2 - 60, WIDTH * 2 // 3)),
    "drift": (slice(HEIGHT // 2, None), slice(WIDTH * 3 // 4, None)),
}


def draw(
    directory: Path, mesh: Mesh, turned: float = 0.1, stretched: float = 1e-3, trajectories: int = TRAJECTORIES
) -> np.ndarray[Any, Any]:
    """The picture of swings, and of rollouts that are ahead of them by an angle, on a rod that has been stretched."""
    parameters, times = PendulumParameters(), np.linspace(0.0, 2.0, TIMES)
    angles = np.cos(3 * times)[:, None] * np.linspace(0.5, 1.0, trajectories)
    rates = -3 * np.sin(3 * times)[:, None] * np.linspace(0.5, 1.0, trajectories)
    truth = torch.from_numpy(states(angles, rates, parameters))
    forecast = torch.from_numpy(states(angles + turned, rates, parameters)) * (1 + stretched)
    forecast[0] = truth[0]
    still = truth[:1].expand_as(truth)
    others = {"persistence": still, "training_mean": torch.zeros_like(truth), "vacuum": still, "true_force": forecast}
    dimensions = ("time", "trajectory", "component")
    variables = {name: Variable(dimensions, value) for name, value in others.items()}
    variables |= {
        "time": Variable(("time",), times),
        "truth": Variable(dimensions, truth),
        "forecast": Variable(dimensions, forecast),
        "scale": Variable(("component",), np.ones(5)),
    }
    write_dataset(directory / "f.h5", variables, mesh)
    draw_report(directory / "r.png", directory / "f.h5", directory / "metrics.jsonl", {})
    return np.asarray(image.imread(directory / "r.png"))


def changed(before: Any, after: Any) -> set[str]:
    """The panels in which two pictures differ."""
    return {name for name, panel in PANELS.items() if (before[panel] != after[panel]).any()}


def test_each_panel_shows_what_it_is_for(tmp_path: Path, mesh: Mesh) -> None:
    before = draw(tmp_path, mesh)
    assert changed(before, draw(tmp_path, mesh)) == set()
    assert {"components", "errors"} <= changed(before, draw(tmp_path, mesh, turned=0.2))
    assert "drift" in changed(before, draw(tmp_path, mesh, stretched=1e-2))
    lines = [{"kind": "step", "step": step, "epoch": 1, "loss": 1.0 / step} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "training" in changed(before, draw(tmp_path, mesh))


def test_drawing_leaves_the_style_of_other_pictures_alone(tmp_path: Path, mesh: Mesh) -> None:
    before = dict(matplotlib.rcParams)
    draw(tmp_path, mesh)
    assert dict(matplotlib.rcParams) == before
