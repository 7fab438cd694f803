"""Mistakes in a problem of one's own: one clear line, exit code 2, nothing left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pnode_dist.cli.main import main
from tests.own_problems import SOURCE, WRONG, changed, written


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_is_one_line_and_leaves_no_run(
    wrong: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, toml, expected = WRONG[wrong]
    monkeypatch.chdir(tmp_path)
    code = main(["train", str(written(tmp_path, source, toml))])
    said = capfd.readouterr()
    assert (code, said.out) == (2, "")
    (line,) = said.err.splitlines()
    assert line.startswith("pnode-dist: error: ")
    assert re.search(expected, line), line
    assert not (tmp_path / "runs").exists()


def test_with_traceback_the_calls_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, changed("return Decay()", "return 1 / 0"))
    try:
        with pytest.raises(ZeroDivisionError):
            main(["train", str(path), "--traceback"])
    finally:
        assert main(["train", str(path)]) == 2


def test_the_problem_that_the_mistakes_are_made_in_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(written(tmp_path, SOURCE))]) == 0
    assert (tmp_path / "runs/own/model.pt").is_file()
