"""The keys of a configuration as data, for the reference, and its JSON Schema for editors."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from pnode_dist.config.diagnosis import allowed, resolved
from pnode_dist.config.load import FROM_FILE_NAME
from pnode_dist.config.tables import Config

DRAFT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class Key:
    """A key of a table. `allowed` is in words, `choices` are all values of a key that has few."""

    name: str
    type: str
    required: bool
    default: Any
    allowed: str
    choices: list[Any] | None
    description: str


@dataclass(frozen=True)
class TableReference:
    """A table of the file, and its keys in the order of their definition."""

    name: str
    description: str
    keys: tuple[Key, ...]


def reference(run: type[Config] = Config) -> list[TableReference]:
    """The tables of a problem's configuration; of `Config` those that all problems share."""
    schema = run.model_json_schema()
    tables = []
    for name, field in run.model_fields.items():
        table = field.annotation
        # `Config` leaves the tables of a problem open.
        if table is BaseModel or not (isinstance(table, type) and issubclass(table, BaseModel)):
            continue
        properties = resolved(schema["properties"][name], schema).get("properties", {})
        keys = tuple(_key(name, key, table, properties[key], schema) for key in _ordered(table))
        tables.append(TableReference(name, inspect.cleandoc(vars(table).get("__doc__") or ""), keys))
    return tables


def _ordered(table: type[BaseModel]) -> list[str]:
    """The keys of a table, `type` first, which inheritance may have moved."""
    return sorted(table.model_fields, key=lambda key: key != "type")


def _key(table: str, name: str, model: type[BaseModel], part: Mapping[str, Any], schema: Mapping[str, Any]) -> Key:
    field = model.model_fields[name]
    required = field.is_required() and (table, name) != FROM_FILE_NAME
    default = None if field.is_required() else to_jsonable_python(field.get_default(call_default_factory=True))
    return Key(
        name, _type(part, schema), required, default, allowed(part, schema), _choices(part, schema),
        " ".join((field.description or "").split()),
    )  # fmt: skip


def _type(part: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The type of a value in TOML's words."""
    part = resolved(part, schema)
    words = {"array": "list", "object": "table"}
    if "anyOf" in part:
        types = dict.fromkeys(_type(choice, schema) for choice in part["anyOf"] if choice.get("type") != "null")
        return " or ".join(types)
    found = str(part.get("type", "any"))
    return words.get(found, found)


def _choices(part: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Any] | None:
    for choice in resolved(part, schema).get("anyOf", [part]):
        found = resolved(choice, schema)
        if "const" in found:
            return [found["const"]]
        if "enum" in found:
            return list(found["enum"])
    return None


def in_words(tables: Sequence[TableReference], width: int) -> str:
    """The reference for a terminal of so many columns."""
    lines: list[str] = []
    for table in tables:
        lines += [f"[{table.name}]", *_wrapped(_without_line_breaks(table.description), width, 2), ""]
        for key in table.keys:
            state = "required" if key.required else "" if key.default is None else f"default {toml_value(key.default)}"
            lines += _wrapped(f"{key.name}: {key.allowed}{'; ' if state else ''}{state}", width, 2, 6)
            lines += [*_wrapped(key.description, width, 6), ""]
    return "\n".join(lines).rstrip()


def _without_line_breaks(text: str) -> str:
    return " ".join(text.split())


def _wrapped(text: str, width: int, indent: int, further: int | None = None) -> list[str]:
    further = indent if further is None else further
    return textwrap.wrap(
        text, width, initial_indent=" " * indent, subsequent_indent=" " * further, break_on_hyphens=False
    )


def toml_value(value: Any) -> str:
    """A value in TOML, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        entries = ", ".join(f"{toml_key(key)} = {toml_value(entry)}" for key, entry in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(entry) for entry in value)}]"
    if isinstance(value, str):
        return _string(value)
    return repr(value)


def toml_key(key: str) -> str:
    """A key in TOML, in quotes where it needs them."""
    bare = key.isascii() and key.replace("-", "_").isidentifier()
    return key if bare else _string(key)


def _string(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    written = (escapes.get(letter, letter if letter.isprintable() else f"\\U{ord(letter):08x}") for letter in text)
    return f'"{"".join(written)}"'


def json_schema(run: type[Config], kind: str) -> dict[str, Any]:
    """The JSON Schema of a problem's configuration file, for editors."""
    schema = run.model_json_schema()
    table, key = FROM_FILE_NAME
    schema["required"] = [name for name in schema["required"] if name != table]
    named = schema["$defs"][schema["properties"][table]["$ref"].rpartition("/")[2]]
    named["required"] = [name for name in named["required"] if name != key]
    return {"$schema": DRAFT, **schema, "title": f"pnode-dist configuration: {kind}"}
