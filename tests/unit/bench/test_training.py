"""The benchmark of an optimiser step, on a problem of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pnode_dist.cli.main import main
from tests.own_problems import written


def test_all_ways_to_keep_a_trajectory_have_the_same_gradient(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "training", str(written(tmp_path)), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    rows = {row["keep"]: row for row in found["rows"]}
    assert list(rows) == ["auto", "graph", "stages", "solution"]
    # A window of two samples, in two steps each, of four stages.
    assert all(row["steps"] == 4 for row in rows.values())
    assert rows["graph"]["evaluations"] == 16
    assert rows["stages"]["evaluations"] == 32
    assert all(row["seconds"] > 0 for row in rows.values())
    (check,) = found["checks"]
    assert check["holds"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["training"], "bench training: needs a CONFIG"),
        (["sync", "own.toml"], "bench sync: has a problem of its own: takes no CONFIG"),
        (["training", "nothing.toml"], "nothing.toml: there is no such configuration file"),
    ],
)
def test_what_is_measured_is_asked_for_rightly(
    arguments: list[str], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert expected in capfd.readouterr().err
