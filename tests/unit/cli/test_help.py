"""The help of each command: an example that works, and its exit codes."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from pnode_dist.cli.exit_codes import ALWAYS, MEANINGS
from pnode_dist.cli.main import main, parser
from tests.conftest import ROOT


def commands(found: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The commands with their parsers, those of groups too."""
    groups = [action for action in found._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield name.strip(), found
    for action in groups:
        for word, sub in action.choices.items():
            yield from commands(sub, f"{name} {word}")


COMMANDS = dict(commands(parser()))


@pytest.mark.parametrize("argv", [[], ["--help"]], ids=["alone", "asked"])
def test_the_program_alone_prints_its_help(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out, err = capfd.readouterr()

    assert err == ""
    assert out.startswith("usage: pnode-dist ")
    for name in COMMANDS:
        assert name.partition(" ")[0] in out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shows_an_example_that_it_accepts(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    (example,) = re.findall(r"^example:\n  pnode-dist (.*)$", capfd.readouterr().out, re.MULTILINE)

    words = shlex.split(example.partition(" > ")[0])
    assert " ".join(words).startswith(command)
    assert parser().parse_args(words).parser.prog == f"pnode-dist {command}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_lists_its_exit_codes_with_their_meanings(command: str) -> None:
    text = COMMANDS[command].format_help()
    codes = dict(re.findall(r"^  (\d+) +(\S.*(?:\n {7}\S.*)*)$", text.partition("exit codes:\n")[2], re.MULTILINE))

    assert set(map(str, ALWAYS)) <= set(codes)
    for code, meaning in codes.items():
        assert " ".join(meaning.split()) == MEANINGS[int(code)]


def test_the_reference_has_the_same_exit_codes() -> None:
    (table,) = re.findall(
        r"\| exit code \| meaning \|\n\| --- \| --- \|\n((?:\|.*\n)*)",
        (ROOT / "docs/reference/exit_codes.md").read_text(),
    )

    rows = re.findall(r"\| (\d+) \| (.*) \|", table)
    assert {int(code): meaning for code, meaning in rows} == MEANINGS
