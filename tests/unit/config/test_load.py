"""Reading a configuration that names a problem of the user's own. Overrides of keys are in test_config.py."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from pnode_dist.config.load import from_tables, load, read, validated
from pnode_dist.config.registry import resolve
from pnode_dist.errors import ConfigurationError
from tests.unit.config.own_problems import FORECAST, TABLES, written


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written(tmp_path / "inside" / "mine.py", FORECAST)
    return written(tmp_path / "inside" / "my.toml", TABLES.format(kind="./mine.py:Decay"))


def test_a_file_in_the_configuration_is_relative_to_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")

    assert load(path).kind == f"{path.with_name('mine.py')}:Decay"


def test_a_file_on_the_command_line_is_relative_to_the_working_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "here.py", FORECAST)
    monkeypatch.chdir(tmp_path)

    assert load(path, ["problem.type=./here.py:Decay"]).kind == f"{tmp_path / 'here.py'}:Decay"


def test_the_resolved_configuration_is_read_from_any_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(path)
    resolved = written(tmp_path / "runs" / "my" / "config.toml", config.to_toml())
    monkeypatch.chdir("/")

    assert tomllib.loads(resolved.read_text())["problem"]["type"] == f"{path.with_name('mine.py')}:Decay"
    assert load(resolved).model_dump() == config.model_dump()


def test_a_wrong_key_of_an_own_problem_is_answered_like_one_of_the_package(path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(path, ["problem.point=3"])
    assert str(caught.value).startswith(
        "--set problem.point=3: [problem] unknown key point (did you mean points?): must be one of type, window, "
    )


def test_a_key_of_another_table_is_found_there(path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"\[training\] unknown key rtol \(it is a key of \[solver\]\): must"):
        load(path, ["training.rtol=1e-3"])


def test_a_problem_that_is_not_found_is_reported_with_the_file(path: Path) -> None:
    path.write_text(TABLES.format(kind="burger"))

    with pytest.raises(ConfigurationError) as caught:
        load(path)
    assert str(caught.value).startswith(f'{path}: [problem] type = "burger": unknown problem (did you mean burgers?)')


def test_a_problem_that_is_not_found_is_reported_with_its_option(path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(path, ["problem.type=burger"])
    assert str(caught.value).startswith('--set problem.type=burger: [problem] type = "burger": unknown problem')


def test_a_type_that_is_no_string_is_refused(path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--set problem.type=3: \[problem\] type = 3: must be a string"):
        load(path, ["problem.type=3"])


def test_tables_of_a_program_are_not_changed(path: Path) -> None:
    tables = {"problem": {"type": f"{path.with_name('mine.py')}:Decay"}, "model": {"width": 3}}
    raw = from_tables(tables, "mine", ["training.epochs=2", "model.width=5"])

    assert tables == {"problem": tables["problem"], "model": {"width": 3}}
    assert validated(raw).run.name == "mine"
    assert raw.tables["model"] == {"width": 5}


def test_a_problem_that_is_known_is_not_looked_for(path: Path) -> None:
    found = resolve("./mine.py:Decay", path.parent)
    raw = read(path, ["problem.type=not_registered"])

    assert validated(raw, found).kind == found.kind
