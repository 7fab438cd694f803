"""The command completion: scripts that complete commands, options and files in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from pnode_dist.cli.parser import PROGRAM, Commands, Parser
from pnode_dist.distributed.launcher import launched_rank

SHELLS = ("bash", "zsh", "tcsh")
_FILES, _DIRECTORIES, _KINDS = ("CONFIG", "FILE"), ("DIR", "RUN_DIR"), "KIND"


def add_commands(commands: Commands) -> None:
    """Add the command."""
    completion = commands.add(
        "completion",
        "print a script that completes commands, options and files in a shell",
        _completion,
        "bash > ~/.local/share/bash-completion/completions/pnode-dist",
        alone=True,
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=" | ".join(SHELLS))


def _completion(arguments: argparse.Namespace) -> int:
    if launched_rank() == 0:
        print(script(arguments.shell))
    return 0


def script(shell: str) -> str:
    """The completion script for a shell, with the problems that are installed now."""
    import shtab

    from pnode_dist.cli.main import parser
    from pnode_dist.config.registry import installed

    root, kinds = parser(), list(installed())
    for action in _arguments(root):
        # shtab reads this attribute.
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.metavar == _KINDS:
            listed = f"({' '.join(kinds)})"
            action.complete = {"bash": "_pnode_dist_kinds", "zsh": listed, "tcsh": listed}  # type: ignore[attr-defined]
    # On lines of their own: shtab 1.7 calls the function where blanks separate nothing.
    lines = "\n".join(kinds)
    words = f'_pnode_dist_kinds() {{\n  compgen -W "{lines}" -- "$1"\n}}\n'
    text: str = shtab.complete(
        root, shell=shell, root_prefix=PROGRAM.replace("-", "_"), preamble=words if shell == "bash" else ""
    )
    return text.rstrip()


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                assert isinstance(command, Parser)
                yield from _arguments(command)
