"""The page of a run: what it shows of the run's files, and that nothing in them can do more than be shown."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pnode_dist import ConfigurationError
from pnode_dist.report.run_curves import Curve, Picture, _thinned, as_svg, pictures
from pnode_dist.report.run_page import figure, summary, write_page

STEP: dict[str, Any] = {
    "kind": "step",
    "epoch": 1,
    "learning_rate": 0.01,
    "gradient_norm": 2.0,
    "forward_steps": 8,
    "recomputed_steps": 3,
    "adjoint_steps": 8,
    "bytes_written": 0,
    "bytes_read": 0,
    "peak_memory": 300 * 2**20,
}


def steps(count: int, **changed: Any) -> list[dict[str, Any]]:
    return [STEP | {"step": n, "loss": 1.0 / n, "wall_time": 0.5 * n, **changed} for n in range(1, count + 1)]


VERSIONS = {"started": "2026-01-02", "ranks": 2, "hosts": ["a", "a"], "packages": {"torch": "2.13.0"}}
CHECK = {"kind": "validation", "step": 2, "epoch": 1, "wall_time": 1.0, "units": "K", "figures": {"rmse": 0.25}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text('[run]\nname = "<script>alert(1)</script>"\n')
    (tmp_path / "versions.json").write_text(json.dumps(VERSIONS))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*steps(3), CHECK]))
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"problem": "<b>x</b>", "skill": {"lead_1": 0.5}, "errors": [{"lead": 1, "model": 0.125}]})
    )
    (tmp_path / "report.png").write_bytes(b"a picture")
    return tmp_path


class Loads(HTMLParser):
    """What a page loads from elsewhere, or runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] if tag in ("script", "link", "iframe") else []
        self.found += [
            str(value) for name, value in attrs if name in ("src", "href") and not str(value).startswith("data:")
        ]


def test_the_page_loads_nothing_and_runs_nothing_that_the_files_contain(run: Path) -> None:
    html = write_page(run).read_text()
    loads = Loads()
    loads.feed(html)
    assert loads.found == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&lt;b&gt;x&lt;/b&gt;" in html


def test_the_page_has_the_figures_the_forecast_and_a_curve_for_every_kind_of_figure(run: Path) -> None:
    html = write_page(run, run / "elsewhere.html").read_text()
    for shown in ("2 on 1 host(s)", "0.25 K", "0.33333", "300 MiB", "lead 1: 0.5", "0.125", "torch 2.13.0"):
        assert shown in html, shown
    assert base64.b64encode(b"a picture").decode() in html
    assert len(re.findall("data:image/svg", html)) == len(pictures([*steps(3), CHECK])) == 7


def test_a_run_without_steps_and_evaluation_has_a_page(run: Path) -> None:
    for name in ("metrics.jsonl", "evaluation.json", "report.png", "versions.json"):
        (run / name).unlink()
    html = write_page(run).read_text()
    assert "There are no metrics yet." in html
    assert "has not been evaluated" in html


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is not a run directory: there is no config\.toml in it"):
        write_page(tmp_path)


def test_a_page_that_cannot_be_written_is_refused(run: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file or directory"):
        write_page(run, run / "missing" / "page.html")


def test_traffic_to_disk_is_drawn_where_there_was_some() -> None:
    titles = [picture.title for picture in pictures(steps(2, bytes_read=2**20))]
    assert "Checkpoints on disk" in titles
    assert "Checkpoints on disk" not in [picture.title for picture in pictures(steps(2))]


def test_the_pace_leaves_out_the_step_after_a_clock_began_again() -> None:
    records = [*steps(2), *(step | {"step": step["step"] + 2} for step in steps(2))]
    (pace,) = [picture for picture in pictures(records) if picture.title == "Pace"]
    assert pace.curves[0].at.tolist() == [1, 2, 4]
    assert pace.curves[0].values.tolist() == [0.5, 0.5, 0.5]


def test_values_that_were_not_finite_are_left_out() -> None:
    loss = pictures([*steps(2), STEP | {"step": 3, "loss": None, "wall_time": 2.0}])[0]
    assert loss.curves[0].at.tolist() == [1, 2]


def test_a_long_curve_is_thinned_to_means_of_all_its_points() -> None:
    at, values = _thinned(Curve("loss", np.arange(9000.0), np.arange(9000.0) * 2))
    assert len(at) == len(values) == 1500
    assert values.mean() == pytest.approx(8999.0)
    assert len(as_svg(Picture("Loss", "step", "loss", (Curve("loss", at, values),)))) < 100_000


def test_the_head_of_a_run_sums_what_was_spilt() -> None:
    assert summary(steps(4, bytes_written=2**20), {})["spilt to disk"] == "4 MiB"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1 / 3, "0.33333"), (None, "-"), ([1, 2.5], "1, 2.5"), ({"a_b": 1}, "a b: 1"), ("x", "x")],
)
def test_figures_are_short(value: Any, shown: str) -> None:
    assert figure(value) == shown
