"""A configuration file to begin with: all keys of a problem, each with its description."""

from __future__ import annotations

import importlib.resources
import textwrap
import tomllib
from collections.abc import Mapping
from typing import Any

from pnode_dist.config.diagnosis import resolved
from pnode_dist.config.reference import Key, reference, toml_value
from pnode_dist.config.registry import installed
from pnode_dist.config.tables import Config

_WIDTH = 100
_INTRODUCTION = """\
Train with: pnode-dist train FILE
A line that begins with #KEY = shows the default of a key, or nothing if the key has none: remove the # to set it."""


def template(kind: str, run: type[Config]) -> str:
    """A commented configuration of the problem, in TOML.

    A registered problem has the values of the file `configs/NAME.toml` in its package. Other required keys have the
    least allowed value, and all other keys their defaults, as comments.
    """
    text = example(kind) or ""
    given = tomllib.loads(text)
    comment = [line.lstrip("# ") for line in text.partition("\n\n")[0].splitlines() if line.startswith("#")]
    lines = [*_comment(" ".join(comment)), *_comment(_INTRODUCTION)]
    schema = run.model_json_schema()
    for table in reference(run):
        properties = resolved(schema["properties"][table.name], schema)["properties"]
        lines += ["", f"[{table.name}]"]
        for key in table.keys:
            lines += ["", *_comment(_described(key))]
            lines.append(_line(table.name, key, kind, given.get(table.name, {}), properties[key.name], schema))
    return "\n".join(lines) + "\n"


def example(kind: str) -> str | None:
    """The text of the example configuration of a registered problem; None if its package has none."""
    entry = installed().get(kind)
    if entry is None:
        return None
    file = importlib.resources.files(entry.module.partition(".")[0]) / "configs" / f"{kind}.toml"
    return file.read_text() if file.is_file() else None


def _described(key: Key) -> str:
    state = " Required." if key.required else ""
    return f"{key.description} ({key.allowed}){state}".strip()


def _comment(text: str) -> list[str]:
    return [
        line
        for paragraph in text.splitlines()
        for line in textwrap.wrap(
            paragraph, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
    ]


def _line(
    table: str, key: Key, kind: str, given: Mapping[str, Any], part: Mapping[str, Any], schema: Mapping[str, Any]
) -> str:
    if (table, key.name) == ("problem", "type"):
        return f"type = {toml_value(kind)}"
    if (table, key.name) == ("run", "name"):
        return "#name ="
    if key.name in given and (key.required or given[key.name] != key.default):
        return f"{key.name} = {toml_value(given[key.name])}"
    if key.required:
        return f"{key.name} = {toml_value(_least(part, schema))}"
    return f"#{key.name} =" if key.default is None else f"#{key.name} = {toml_value(key.default)}"


def _least(part: Mapping[str, Any], schema: Mapping[str, Any]) -> Any:
    """The least value that a JSON schema allows, or its first choice; 1 for numbers without a bound."""
    part = resolved(part, schema)
    if "anyOf" in part:
        part = resolved(part["anyOf"][0], schema)
    for keyword in ("enum", "examples"):
        if keyword in part:
            return part[keyword][0]
    if "const" in part:
        return part["const"]
    match part.get("type"):
        case "integer":
            return part.get("minimum", part.get("exclusiveMinimum", 0) + 1)
        case "number":
            return float(part.get("minimum", part.get("exclusiveMinimum", 0) + 1))
        case "boolean":
            return False
        case "array":
            entries = part.get("prefixItems") or [part.get("items", {})] * part.get("minItems", 0)
            return [_least(entry, schema) for entry in entries]
        case "object":
            return {}
        case _:
            return ""
