"""Writes the pages of docs/reference/ that follow from the code: configurations, commands, and methods.

    python docs/mkdocs/reference_pages.py

A test compares the pages with the code.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pnode_dist.cli.exit_codes import ALWAYS, MEANINGS
from pnode_dist.cli.main import parser
from pnode_dist.config.reference import Key, TableReference, reference, toml_value
from pnode_dist.config.registry import installed, resolve
from pnode_dist.config.tables import Config
from pnode_dist.ode.methods import FAMILIES, METHODS

REFERENCE = Path(__file__).parents[1] / "reference"
_WRITTEN = "<!-- Written by docs/mkdocs/reference_pages.py -->\n"


def pages() -> dict[str, str]:
    """Return the text of each page by its path in docs/reference/."""
    own = sorted(name for name, entry in installed().items() if entry.module.startswith("pnode_dist."))
    return {
        "configuration/index.md": configuration(own),
        **{f"configuration/{name}.md": configuration_of(name) for name in own},
        "command_line.md": command_line(),
        "methods.md": methods(),
    }


def configuration(problems: list[str]) -> str:
    """The page of the tables that all problems share."""
    links = "\n".join(f"- [`{name}`]({name}.md): {resolve(name, Path()).definition.description}" for name in problems)
    return f"""{_WRITTEN}
# Configuration

A configuration is a TOML file. This page lists the tables that all problems share. `[problem]`, `[model]` and
`[evaluation]` differ between problems:

{links}

The same text is printed by `pnode-dist config reference` and `pnode-dist config reference burgers`. See
[Configurations](../../guides/configurations.md) for a start.

{_tables(reference(Config))}"""


def configuration_of(problem: str) -> str:
    """The page of one problem: its own tables, and those in which it differs from the shared ones."""
    definition = resolve(problem, Path()).definition
    shared = reference(Config)
    own = [table for table in reference(definition.run) if table not in shared]
    return f"""{_WRITTEN}
# `{problem}`

{definition.description} The other tables are [those of all problems](index.md).

`pnode-dist config init {problem}` prints a configuration to begin with.

{_tables(own)}"""


def _tables(tables: list[TableReference]) -> str:
    return "\n".join(part for table in tables for part in _table(table))


def _table(table: TableReference) -> Iterator[str]:
    yield f"## `[{table.name}]`\n\n{_one_line(table.description)}\n"
    for key in table.keys:
        state = "required" if key.required else "" if key.default is None else f"default `{toml_value(key.default)}`"
        yield f"### `{table.name}.{key.name}`\n\n{(_sentence(_values(key)) + _sentence(state)).rstrip()}\n"
        if key.description:
            yield f"{_one_line(key.description)}\n"


def _values(key: Key) -> str:
    if key.choices is None:
        return key.allowed
    values = ", ".join(f"`{toml_value(value)}`" for value in key.choices)
    return f"one of {values}" if len(key.choices) > 1 else f"always {values}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}. " if text else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def command_line() -> str:
    """The page of all commands, their arguments and their exit codes."""
    commands = "\n".join(part for name, command in _commands(parser()) for part in _command(name, command))
    return f"""{_WRITTEN}
# Command line

`pnode-dist COMMAND --help` prints the same. Arguments after `--` are PETSc options, such as
`-- -ts_monitor -log_view`. On several ranks start a command by `launch/mpirun.sh -n 2` or `launch/srun.sh -n 2`.
[Exit codes and faults](exit_codes.md) lists what can go wrong.

{commands}"""


def _commands(
    found: argparse.ArgumentParser, name: str = "pnode-dist"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in found._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, sub in action.choices.items():
                yield from _commands(sub, f"{name} {command}")
            return
    yield name, found


def _command(name: str, command: argparse.ArgumentParser) -> Iterator[str]:
    example, _, codes = (command.epilog or "").partition("exit codes:")
    yield f"## `{name}`\n\n{command.description}\n"
    yield f"```text\n{example.partition('example:')[2].strip()}\n```\n"
    arguments = [action for action in command._actions if "--help" not in action.option_strings]
    if arguments:
        yield "| argument | meaning |\n| --- | --- |"
        for action in arguments:
            yield f"| {_argument(action)} | {_cell(action.help or '')} |"
        yield ""
    found = [int(code) for code in re.findall(r"^  (\d+) ", codes, re.MULTILINE)]
    assert set(ALWAYS) <= set(found) <= set(MEANINGS)
    yield f"Exit codes: {', '.join(map(str, found))}.\n"


def _argument(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else (action.dest or "").upper()
    if not action.option_strings:
        return f"`{value}`" if action.nargs != "?" else f"`{value}` (may be left out)"
    option = action.option_strings[-1]
    # A bar in a cell would end it, also between backticks.
    return f"`{option}`" if action.nargs == 0 else f"<code>{option} {value.replace('|', '&#124;')}</code>"


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def methods() -> str:
    """The page of all methods, a table for each family."""
    parts = "\n".join(part for family in FAMILIES for part in _family(family))
    return f"""{_WRITTEN}
# Methods

`pnode-dist methods` prints these tables. `method` of a solve, or `[solver] method`, is a name of the first column.

- *error*: the method estimates the error of a step, so `rtol` and `atol` may be given.
- *stiffly accurate*: the result of a step is its last stage. Algebraic equations need this.
- *adjoint*: the method has a gradient. The tests compare it with an independent implementation. The others solve
  forward only, because PETSc has no adjoint of them.

{parts}"""


_WITHOUT_TS = {
    "irk": "PETSc's SNES solves their equations; its TSIRK takes no part",
    "symplectic": "PETSc takes no part in their steps",
}


def _family(family: Any) -> Iterator[str]:
    found = [method for method in METHODS.values() if method.family == family]
    if not found:
        return
    yield f"## {FAMILIES[family][0].upper()}{FAMILIES[family][1:]}\n"
    yield f"PETSc's family `{family}`.\n" if found[0].petsc_name else f"{_WITHOUT_TS[family]}.\n"
    yield "| method | PETSc's name | order | stages | error | stiffly accurate | adjoint | source |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for method in found:
        marks = (method.estimates_error, method.stiffly_accurate, method.adjoint == "verified")
        in_petsc = f"`{method.petsc_name}`" if method.petsc_name else "-"
        names = (f"`{method.name}`", in_petsc, str(method.order), str(method.stages))
        yield f"| {' | '.join([*names, *('yes' if mark else 'no' for mark in marks), method.source])} |"
    yield ""


if __name__ == "__main__":
    for path, text in pages().items():
        (REFERENCE / path).write_text(text.rstrip() + "\n")
