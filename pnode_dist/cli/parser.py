"""The argument parser of the command line, and the options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from pnode_dist.distributed.launcher import launched_rank
from pnode_dist.errors import ConfigurationError

PROGRAM = "pnode-dist"
FAILED, WRONG_USAGE, PREEMPTED, INTERRUPTED = 1, 2, 75, 130
EPILOG = "Arguments after -- are PETSc options, such as: -- -ts_monitor -log_view"
Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """argparse that complains in one line, and prints on the first rank alone."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if launched_rank() == 0:
            super()._print_message(message, file)


class Commands:
    """The commands of a parser, to which each group adds its own."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(self, name: str, text: str, command: Command, alone: bool = False) -> Parser:
        """Add a command with a line of help; one that runs `alone` needs no MPI."""
        sub = self._commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=EPILOG, allow_abbrev=False
        )
        sub.set_defaults(command=command, alone=alone)
        assert isinstance(sub, Parser)
        return sub


def add_overrides(parser: Parser) -> None:
    """Add `--set`, and `--traceback` for errors in a user's own problem."""
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="put a value over the configuration's; may be repeated",
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show the whole traceback of an error in a problem of your own"
    )


def add_json(parser: Parser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
