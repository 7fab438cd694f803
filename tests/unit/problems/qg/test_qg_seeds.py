"""Scores of several runs together: means and ranges of the learnt closures, beside the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pnode_dist.problems.qg.scores import DISTRIBUTIONAL, SPECTRAL
from pnode_dist.problems.qg.seeds import main, scores_of, together


def evaluated(directory: Path, **closures: float) -> Path:
    """A run whose scores by statistic are these numbers, plus 0.01 for each statistic before."""
    directory.mkdir()
    names = (*DISTRIBUTIONAL, *SPECTRAL)
    rows: list[dict[str, Any]] = [
        {"statistic": name, **{closure: value + 0.01 * place for closure, value in closures.items()}}
        for place, name in enumerate(names)
    ]
    (directory / "evaluation.json").write_text(json.dumps({"scores": rows}))
    return directory


def test_each_statistic_has_the_mean_and_the_range_of_the_runs(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "a", model=0.1, smagorinsky=-1.0), evaluated(tmp_path / "b", model=0.4)]
    rows = {row.pop("statistic"): row for row in together([scores_of(run) for run in runs])}
    assert rows[DISTRIBUTIONAL[0]] == pytest.approx({"mean": 0.25, "least": 0.1, "largest": 0.4, "smagorinsky": -1.0})
    middle = 0.01 * (len(DISTRIBUTIONAL) - 1) / 2
    assert rows["all distributions"] == pytest.approx(
        {"mean": 0.25 + middle, "least": 0.1 + middle, "largest": 0.4 + middle, "smagorinsky": -1.0 + middle}
    )
    assert list(rows) == [*DISTRIBUTIONAL, *SPECTRAL, "all distributions", "all spectra"]


def test_the_command_counts_the_statistics_in_which_the_runs_are_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated(tmp_path / "a", model=0.1, smagorinsky=-1.0, backscatter=0.2)
    assert main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| statistic | mean | least | largest | smagorinsky | backscatter |"
    assert lines[2] == "| q1 | 0.10 | 0.10 | 0.10 | -1.00 | 0.20 |"
    count = len(DISTRIBUTIONAL) + len(SPECTRAL)
    assert lines[-2:] == [
        f"better than smagorinsky in {count} of {count} statistics",
        f"better than backscatter in 0 of {count} statistics",
    ]


@pytest.mark.parametrize("scores", [None, [], [{"statistic": "q1", "smagorinsky": 0.1}]])
def test_a_run_without_scores_is_refused(
    scores: list[dict[str, Any]] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({} if scores is None else {"scores": scores}))
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: has no scores: ")
