"""Reading a configuration file, and overriding single keys of it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pnode_dist.errors import ConfigurationError


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a configuration file. Raises `ConfigurationError` if there are none to read."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: there is no such configuration file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: not valid TOML: {error}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: not valid TOML: not a text in UTF-8") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None


def apply_override(tables: dict[str, Any], override: str) -> tuple[str, ...]:
    """Put one override into `tables`; returns the keys it went to."""
    dotted, equals, text = override.partition("=")
    keys = tuple(key.strip() for key in dotted.split("."))
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigurationError(f"--set {override}: must be section.key=value, such as training.epochs=10")
    table = tables
    for depth, key in enumerate(keys[:-1], 1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"--set {override}: {'.'.join(keys[:depth])} is a value, not a table")
    table[keys[-1]] = _value(text.strip())
    return keys


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text
