"""The argument parser of the command line, and the options that several commands have."""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from pnode_dist.cli.exit_codes import ALWAYS, MEANINGS
from pnode_dist.distributed.launcher import launched_rank
from pnode_dist.errors import ConfigurationError

PROGRAM = "pnode-dist"
EPILOG = "Arguments after -- are PETSc options, such as: -- -ts_monitor -log_view"
Command = Callable[[argparse.Namespace], int]
_WIDTH = 100


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that suggest the nearest name, and output on the first rank alone."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments. Raises `ConfigurationError` for one that the chosen command does not have."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            chosen: Parser = getattr(found, "parser", self)
            options = [text for action in chosen._actions for text in action.option_strings]
            hint = nearest(unknown[0].partition("=")[0], options) if unknown[0].startswith("-") else ""
            chosen.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            name = {"COMMAND": "command", "NAME": "name"}.get(str(action.metavar), str(action.metavar))
            raise ConfigurationError(
                f"unknown {name} {value!r}{nearest(str(value), choices)}: must be one of {', '.join(choices)} "
                f"(see {self.prog} --help)"
            )

    def _print_message(self, message: str, file: Any = None) -> None:
        if message and launched_rank() == 0:
            # argparse itself hides that nobody reads it.
            (file or sys.stderr).write(message)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean NAME?)` for the most similar known name; empty if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def formatter(prog: str) -> argparse.HelpFormatter:
    """The format of all help: paragraphs as they are written, in columns of which the first is wide enough."""
    width = min(shutil.get_terminal_size((_WIDTH, 0)).columns, _WIDTH)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=width)


class Commands:
    """The commands of a parser, to which each group adds its own. Without a command the parser prints its help."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(title="commands", metavar="COMMAND")
        parser.set_defaults(command=lambda arguments: _print_help(parser), alone=True)

    def add(
        self,
        name: str,
        text: str,
        command: Command,
        example: str,
        ends: Sequence[int] = (),
        alone: bool = False,
    ) -> Parser:
        """Add a command with a line of help, an example of its arguments, and the exit codes that not all have.

        A command that runs `alone` needs no MPI.
        """
        sub = self._add(name, text, f"{_example(self._commands, name, example)}\n\n{_codes(ends)}\n\n{EPILOG}")
        sub.set_defaults(command=command, alone=alone, parser=sub)
        return sub

    def group(self, name: str, text: str) -> Commands:
        """Add a command that has commands of its own."""
        sub = self._add(name, text, f"See {self._commands._prog_prefix} {name} COMMAND --help for each of them.")
        sub.set_defaults(parser=sub)
        return Commands(sub)

    def _add(self, name: str, text: str, epilog: str) -> Parser:
        sub = self._commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=formatter,
        )
        assert isinstance(sub, Parser)
        return sub


def _print_help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0


def _example(commands: Any, name: str, example: str) -> str:
    return "example:\n  " + f"{commands._prog_prefix} {name} {example}".rstrip()


def _codes(ends: Sequence[int]) -> str:
    lines = ["exit codes:"]
    for code in sorted({*ALWAYS, *ends}):
        lines += textwrap.wrap(MEANINGS[code], _WIDTH - 7, initial_indent=f"  {code:<4} ", subsequent_indent=" " * 7)
    return "\n".join(lines)


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
    add_traceback(parser)


def add_traceback(parser: Parser) -> None:
    """Add `--traceback`."""
    parser.add_argument(
        "--traceback", action="store_true", help="show the whole traceback of an error in a problem of your own"
    )


def add_json(parser: Parser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
