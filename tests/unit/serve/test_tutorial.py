"""The pages on the service: their commands start one, and their programs print what the pages show."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import stat
from pathlib import Path

import pytest

from pnode_dist import Mesh
from pnode_dist.cli.main import parser
from pnode_dist.serve.access import read_token
from pnode_dist.train.configured import configured
from pnode_dist.train.run import build_problem
from tests.conftest import ROOT
from tests.documents import Block, blocks_of
from tests.serving import started, while_served

TUTORIAL, GUIDE = ROOT / "docs" / "tutorials" / "serve.md", ROOT / "docs" / "guides" / "service.md"
THIS = "tests/unit/serve/test_tutorial.py"
# The sizes of the page's problem play no role here.
SMALL = [
    part
    for setting in ("problem.points=8", "problem.trajectories=4", "training.batch_size=4")
    for part in ("--set", setting)
]


def blocks(page: Path, language: str) -> list[Block]:
    return [block for block in blocks_of(page.read_text()) if block.language == language and THIS in block.run_by]


def arguments(command: str) -> list[str]:
    """The arguments of the service in a command of a page, which the parser takes."""
    found = shlex.split(command.partition("pnode-dist ")[2])
    parser().parse_args(found)
    return found[1:]


def started_as_shown() -> tuple[int, list[str]]:
    """The number of ranks of the tutorial's command, and the arguments of the service."""
    (command,) = blocks(TUTORIAL, "console")[0].commands
    ranks = re.match(r"launch/mpirun\.sh -n (\d+) ", command)
    assert ranks is not None
    return int(ranks[1]), arguments(command)


def printed(url: str) -> list[tuple[str, str | None]]:
    """The output of each program of the tutorial, and that on the page."""
    names: dict[str, object] = {}
    found = []
    for program in blocks(TUTORIAL, "python"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(program.text.replace("http://127.0.0.1:4242", url), names)
        found.append((out.getvalue(), program.output))
    return found


def test_the_programs_of_the_tutorial_print_what_it_shows(tmp_path: Path, mesh: Mesh) -> None:
    _, (source, *others) = started_as_shown()
    assert others == []
    config, problem = configured(ROOT / source, SMALL[1::2])
    models = build_problem(config, mesh, found=problem).served()
    found = while_served(models, mesh, tmp_path, printed)
    assert found is not None
    assert len(found) == 3
    for output, shown in found:
        assert output == shown


@pytest.mark.nightly
def test_the_programs_of_the_tutorial_print_the_same_from_its_command(tmp_path: Path) -> None:
    ranks, (source, *others) = started_as_shown()
    with started(ranks, tmp_path, ROOT / source, *others) as service:
        for output, shown in printed(service.url):
            assert output == shown


def test_the_token_of_the_guide_is_one_that_the_service_takes(tmp_path: Path) -> None:
    make, fill, serve = blocks(GUIDE, "console")[0].commands
    assert make == "install -m 600 /dev/null token"
    token = tmp_path / "token"
    token.touch(0o600)
    program, target = fill.removeprefix("python -c ").split(" > ")
    assert target == token.name
    printed: list[str] = []
    exec(shlex.split(program)[0], {"print": printed.append})
    token.write_text(f"{printed[0]}\n")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert read_token(token) == printed[0]
    assert arguments(serve)[-2:] == ["--token-file", "token"]
