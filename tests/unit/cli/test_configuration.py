"""The commands of a configuration, as they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pnode_dist.cli.main import main
from pnode_dist.config.registry import resolve
from pnode_dist.config.template import template
from tests.oracles.json_schema import check_schema
from tests.unit.config.own_problems import FORECAST, written

Capture = pytest.CaptureFixture[str]


def printed(capfd: Capture, *argv: str) -> str:
    assert main(list(argv)) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


def test_the_reference_of_a_problem_has_its_tables_and_the_common_ones(capfd: Capture) -> None:
    common, robertson = (printed(capfd, "config", "reference", *kind) for kind in ([], ["robertson"]))

    assert "[training]" in common.splitlines()
    assert "[rival]" not in common.splitlines()
    assert {"[training]", "[rival]", "[problem]"} <= set(robertson.splitlines())
    assert "  hang_limit: a number of at least 0; default 1800.0\n" in robertson


def test_the_reference_as_json_has_types_and_defaults(capfd: Capture) -> None:
    found = json.loads(printed(capfd, "config", "reference", "burgers", "--json"))

    assert found["kind"] == "burgers"
    tables = {table["name"]: {key["name"]: key for key in table["keys"]} for table in found["tables"]}
    assert tables["solver"]["reach"] == {
        "name": "reach",
        "type": "integer",
        "required": False,
        "default": 1,
        "allowed": "an integer of at least 1",
        "choices": None,
        "description": tables["solver"]["reach"]["description"],
    }


def test_the_schema_is_json_for_an_editor(capfd: Capture) -> None:
    schema = json.loads(printed(capfd, "config", "schema", "flows"))

    check_schema(schema)
    assert schema["title"] == "pnode-dist configuration: flows"
    assert "run" not in schema["required"]


def test_init_prints_the_template(capfd: Capture) -> None:
    assert printed(capfd, "config", "init", "pendulum") == template(
        "pendulum", resolve("pendulum", Path()).definition.run
    )


@pytest.mark.parametrize("command", ["reference", "schema", "init"])
def test_what_an_own_problem_prints_is_not_part_of_the_output(
    command: str, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "mine.py", f"print('hello')\n{FORECAST}")
    monkeypatch.chdir(tmp_path)

    assert main(["config", command, "./mine.py:Decay"]) == 0
    out, err = capfd.readouterr()
    assert "Points of the state." in out
    assert "hello" not in out
    assert err == "hello\n"


def test_an_error_in_an_own_problem_is_one_line(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "mine.py", "1 / 0\n")
    monkeypatch.chdir(tmp_path)

    assert main(["config", "init", "./mine.py:Decay"]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{tmp_path / 'mine.py'}:1: ZeroDivisionError" in err
    with pytest.raises(ZeroDivisionError):
        main(["config", "init", "./mine.py:Decay", "--traceback"])


def test_config_without_a_command_prints_its_help(capfd: Capture) -> None:
    out = printed(capfd, "config")

    assert out.startswith("usage: pnode-dist config ")
    for command in ("reference", "schema", "init"):
        assert command in out
