"""Mistakes of `pnode-dist serve` are one line, before anything is served."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from pnode_dist.cli.main import main
from tests.own_problems import changed, written


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The line of a command that ends with exit code 2."""
    assert main(["serve", *map(str, arguments)]) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("pnode-dist: error: ")
    return line.removeprefix("pnode-dist: error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "serve: --port 70000: must be from 0 to 65535"),
        (["--waiting", "0"], "serve: --waiting 0: must be from 1 to 100000"),
        (["--deadline", "nan"], "serve: --deadline nan: must be from 0 to 10000000"),
        (["--max-body", "-1"], "serve: --max-body -1: must be from 1 to 4096"),
        (["--insecure", "--token-file", "token"], "serve: --insecure and --token-file: must be one of them"),
        (["--host", "0.0.0.0"], "serve: --host 0.0.0.0: can be reached by others: must have a --token-file"),
        (["--host", "no.such.host.invalid", "--insecure"], "serve: --host no.such.host.invalid --port 4242: cannot"),
        (["--url-file", "nowhere/url"], "serve: --url-file nowhere/url: there is no directory nowhere"),
        (["--set", "mesh.data=2", "--set", "mesh.state=1"], "[mesh] data = 2: must be 1: a service has no replicas"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert refused(capfd, written(tmp_path), *arguments).startswith(message)


def test_a_port_in_use_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused(capfd, written(tmp_path), "--port", port)
    assert line == f"serve: --host 127.0.0.1 --port {port}: cannot listen there: Address already in use"


def test_a_directory_that_is_no_finished_run_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert str(run / "config.toml") in refused(capfd, run)
    path = written(tmp_path)
    (run / "config.toml").write_text(path.read_text().replace("./own.py", str(tmp_path / "own.py")))
    assert f"{run / 'model.pt'}: there is no such file: the run has not saved its model" in refused(capfd, run)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("()", r"serves no model: must define served\(\)"),
        ("None", "NoneType has no refusal and no input_sizes and .*: must have the methods of pnode_dist"),
        ("[*super().served(), super().served()[0]]", "forecast_of_initial_state, forecast_of_parameters must be diff"),
        ("1 / 0", r"own\.py:\d+: ZeroDivisionError: "),
    ],
)
def test_mistakes_of_served_are_one_line(
    returned: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = changed(
        "    def build_partition", f"    def served(self):\n        return {returned}\n\n    def build_partition"
    )
    assert re.search(message, refused(capfd, written(tmp_path, source)))
