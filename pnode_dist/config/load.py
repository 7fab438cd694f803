"""Reading a configuration file: TOML, overrides from the command line, and the tables of the problem it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pnode_dist.config.diagnosis import first_error, shown
from pnode_dist.config.reading import apply_override, read_tables
from pnode_dist.config.registry import DEFAULT, Registered, resolve
from pnode_dist.config.tables import Config
from pnode_dist.errors import ConfigurationError

FROM_FILE_NAME = ("run", "name")
"""The key whose default is the name of the file."""


@dataclass(frozen=True)
class RawTables:
    """The tables of a configuration before they are validated, for ranks that do not read the file themselves.

    `directory` is where a problem's file is looked for. `sources` names the option that set each overridden key.
    """

    source: str
    directory: str
    tables: dict[str, Any]
    sources: dict[tuple[str, ...], str]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and validate a configuration file, with `section.key=value` overrides put over it.

    An override's value is read as a TOML value, and as a string if it is none.
    Raises `ConfigurationError`: one line with the file, the key, its value and what is allowed.
    """
    return validated(read(path, overrides))


def read(path: str | Path, overrides: Sequence[str] = ()) -> RawTables:
    """The tables of a configuration file under the overrides. Raises `ConfigurationError` in one line."""
    path = Path(path)
    return _overridden(str(path), path.parent, read_tables(path), path.stem, overrides)


def from_tables(tables: Mapping[str, Any], name: str, overrides: Sequence[str] = ()) -> RawTables:
    """Tables that a program gives in place of a file, for a run called `name`."""
    copied = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tables.items()}
    return _overridden("configuration", Path(), copied, name, overrides)


def validated(raw: RawTables, found: Registered | None = None) -> Config:
    """The configuration that the tables are, for the problem that they name, which is imported, or for `found`.

    Raises `ConfigurationError` in one line.
    """
    tables, sources = dict(raw.tables), raw.sources
    problem = tables.get("problem")
    kind = problem.get("type", DEFAULT) if isinstance(problem, dict) else DEFAULT
    if not isinstance(kind, str):
        raise ConfigurationError(f"{_origin(raw)}: [problem] type = {shown(kind)}: must be a string")
    if found is None:
        try:
            found = resolve(kind, Path(raw.directory))
        except ConfigurationError as error:
            raise ConfigurationError(f'{_origin(raw)}: [problem] type = "{kind}": {error}') from None
    if found.kind != kind and isinstance(problem, dict | None):
        tables["problem"] = {**(problem or {}), "type": found.kind}
    try:
        return found.definition.run.model_validate(tables)
    except ValidationError as error:
        raise ConfigurationError(first_error(error, found.definition.run, raw.source, sources)) from None


def _origin(raw: RawTables) -> str:
    return raw.sources.get(("problem", "type"), raw.source)


def _overridden(source: str, directory: Path, tables: dict[str, Any], name: str, overrides: Sequence[str]) -> RawTables:
    sources = {}
    for override in overrides:
        sources[apply_override(tables, override)] = f"--set {override}"
    if ("problem", "type") in sources:
        # A file that is named on the command line is relative to where the command is run.
        directory = Path()
    table, key = FROM_FILE_NAME
    run = tables.setdefault(table, {})
    if isinstance(run, dict):
        run.setdefault(key, name)
    return RawTables(source, str(directory.resolve()), tables, sources)
