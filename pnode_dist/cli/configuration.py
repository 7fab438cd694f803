"""The commands of a configuration: config reference, config schema and config init."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pnode_dist.cli.parser import Commands, add_json, add_traceback
from pnode_dist.distributed.launcher import launched_rank
from pnode_dist.system.json_lines import json_line

if TYPE_CHECKING:
    from pnode_dist.config.registry import Registered

_KIND = "a problem: a name from pnode-dist problems, ./mine.py:MyProblem, or my_package.my_module:MyProblem"
_NARROW, _WIDE = 60, 100


def add_commands(commands: Commands) -> None:
    """Add the commands."""
    config = commands.group("config", "describe the configuration of a problem, or begin one")
    reference = config.add(
        "reference",
        "list all tables and keys with types, defaults, allowed values and descriptions",
        _reference,
        "burgers",
        alone=True,
    )
    reference.add_argument("kind", metavar="KIND", nargs="?", help=f"{_KIND}; without it, the tables of all problems")
    add_json(reference)
    schema = config.add(
        "schema",
        "print the JSON Schema of a configuration, with which editors complete and check TOML files",
        _schema,
        "burgers > burgers.schema.json",
        alone=True,
    )
    init = config.add("init", "print a commented configuration to begin with", _init, "burgers > my.toml", alone=True)
    for command in (schema, init):
        command.add_argument("kind", metavar="KIND", help=_KIND)
    for command in (reference, schema, init):
        add_traceback(command)


def _found(kind: str) -> Registered:
    from pnode_dist.config.registry import resolve

    # A problem's module may print as it is imported.
    with contextlib.redirect_stdout(sys.stderr):
        return resolve(kind, Path())


def _reference(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from pnode_dist.config.reference import in_words, reference
    from pnode_dist.config.tables import Config

    run = Config if arguments.kind is None else _found(arguments.kind).definition.run
    tables = reference(run)
    if arguments.json:
        _say(json_line({"kind": arguments.kind, "tables": [asdict(table) for table in tables]}))
    else:
        _say(in_words(tables, min(max(shutil.get_terminal_size((_WIDE, 0)).columns, _NARROW), _WIDE)))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from pnode_dist.config.reference import json_schema

    _say(json.dumps(json_schema(_found(arguments.kind).definition.run, arguments.kind), indent=2))
    return 0


def _init(arguments: argparse.Namespace) -> int:
    from pnode_dist.config.template import template

    _say(template(arguments.kind, _found(arguments.kind).definition.run).rstrip())
    return 0


def _say(text: str) -> None:
    if launched_rank() == 0:
        print(text, flush=True)
