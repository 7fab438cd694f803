"""The output of commands: figures as tables for people, or one JSON object."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pnode_dist.system.json_lines import json_line

if TYPE_CHECKING:
    from rich.console import Console

_FILE_WIDTH = 160


@contextlib.contextmanager
def output(as_json: bool, shown: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that prints a command's result as JSON on standard output.

    With `as_json`, all other output goes to standard error, also that of libraries written in C, now and when PETSc is
    finalised.
    """
    if not as_json:
        yield lambda result: None
        return
    results: list[dict[str, Any]] = []
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield results.append
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
    if shown:
        for result in results:
            print(json_line(result), flush=True)
    atexit.register(os.dup2, 2, 1)


def console() -> Console:
    """Standard output; as wide as it takes where it is not a terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)


def show_table(result: dict[str, Any]) -> None:
    """Print figures for people: lists of rows as tables, the rest as lines."""
    from rich.table import Table

    out = console()
    for key, value in result.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            table = Table(title=key.replace("_", " "))
            for column, entry in value[0].items():
                justify: Literal["left", "right"] = "left" if isinstance(entry, str) else "right"
                table.add_column(column.replace("_", " "), justify=justify, overflow="fold")
            for row in value:
                table.add_row(*(_figure(entry) for entry in row.values()))
            out.print(table)
        elif isinstance(value, dict):
            for name, entry in value.items():
                out.print(f"{key.replace('_', ' ')}: {name.replace('_', ' ')}: {_figure(entry)}", highlight=False)
        else:
            out.print(f"{key.replace('_', ' ')}: {_figure(value)}", highlight=False)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_figure(entry) for entry in value)
    return "-" if value is None else str(value)
