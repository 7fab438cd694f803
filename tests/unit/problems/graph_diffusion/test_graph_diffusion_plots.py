"""The picture of a run on a mesh: that it is drawn from whatever rollouts and metrics there are, in one size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import image

from pnode_dist import Mesh
from pnode_dist.problems.graph_diffusion.mesh import irregular_mesh
from pnode_dist.problems.graph_diffusion.plots import draw_report
from pnode_dist.report.dataset_file import Variable, write_dataset

HEIGHT, WIDTH = 1320, 1620
BOTTOM = slice(HEIGHT * 7 // 10, None)
NODES = 12


def draw(
    directory: Path, mesh: Mesh, times: int = 8, largest_error: float = 0.1, learnt: float = 0.5
) -> np.ndarray[Any, Any]:
    """The picture of random trajectories and of rollouts that lie up to `largest_error` beside them."""
    generator = np.random.default_rng(0)
    nodes = irregular_mesh(NODES, 0)
    truth = torch.from_numpy(generator.uniform(0, 1, (2, times, NODES)))
    error = largest_error * torch.from_numpy(generator.uniform(-1, 1, truth.shape))
    error[:, 0] = 0
    trajectories = {"truth": truth, "model": truth + error, "linear": truth - 2 * error}
    trajectories["persistence"] = truth[:, :1].expand_as(truth)
    temperature = torch.linspace(0, 1, 6, dtype=torch.float64)
    variables = {name: Variable(("trajectory", "time", "node"), values) for name, values in trajectories.items()}
    variables |= {
        "time": Variable(("time",), 0.5 * np.arange(times)),
        "x": Variable(("node",), nodes.points[:, 0]),
        "y": Variable(("node",), nodes.points[:, 1]),
        "edge_index": Variable(("end", "edge"), nodes.edge_index),
        "temperature": Variable(("temperature",), temperature),
        "conductivity_true": Variable(("temperature",), temperature**2),
        "conductivity_learnt": Variable(("temperature",), learnt * temperature),
        "conductivity_constant": Variable((), 0.3),
    }
    write_dataset(directory / "f.h5", variables, mesh)
    draw_report(directory / "r.png", directory / "f.h5", directory / "metrics.jsonl", {})
    picture = np.asarray(image.imread(directory / "r.png"))
    assert picture.shape[:2] == (HEIGHT, WIDTH)
    return picture


def test_every_panel_shows_what_it_is_of(tmp_path: Path, mesh: Mesh) -> None:
    plain = draw(tmp_path, mesh)
    lines = [{"kind": "step", "step": step, "epoch": 1, "loss": 1.0 / step} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = draw(tmp_path, mesh, largest_error=0.3, learnt=0.9)
    maps = (slice(0, HEIGHT // 2), slice(None))
    panels = [
        (BOTTOM, slice(*columns)) for columns in ((0, WIDTH * 4 // 10), (WIDTH // 2, WIDTH * 7 // 10), (-300, None))
    ]
    for shown in (maps, *panels):
        assert (other[shown] != plain[shown]).any(), shown


def test_few_samples_and_rollouts_without_error_are_drawn_in_any_style(tmp_path: Path, mesh: Mesh) -> None:
    before = dict(matplotlib.rcParams)
    draw(tmp_path, mesh, times=2, largest_error=0.0)
    assert dict(matplotlib.rcParams) == before
