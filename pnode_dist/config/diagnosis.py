"""Saying in one line what is wrong with a configuration: pydantic's errors, with what the schema allows."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Schema = Mapping[str, Any]
_LONGEST_VALUE = 60
# Of TOML, so that nobody needs to be told.
_LARGEST_INTEGER = 2**63 - 1


def first_error(
    error: ValidationError, model: type[BaseModel], source: str, overrides: Mapping[tuple[str, ...], str]
) -> str:
    """One line for the first of pydantic's errors, and how many other keys are wrong.

    `source` names the file; `overrides` maps keys to the option that set them, which is named in its place.
    """
    schema = model.model_json_schema()
    by_key: dict[tuple[str, ...], ErrorDetails] = {}
    for details in error.errors(include_url=False):
        by_key.setdefault(tuple(str(part) for part in details["loc"][:2]), details)
    keys, details = next(iter(by_key.items()))
    others = f" (and {len(by_key) - 1} more)" if len(by_key) > 1 else ""
    return f"{_origin(keys, source, overrides)}: {_sentence(details, schema)}{others}"


def _origin(keys: tuple[str, ...], source: str, overrides: Mapping[tuple[str, ...], str]) -> str:
    """The option that set the keys, or else the file."""
    return next((text for path, text in overrides.items() if path[: len(keys)] == keys), source)


def _sentence(details: ErrorDetails, schema: Schema) -> str:
    location, kind, value = details["loc"], details["type"], details["input"]
    names = [str(part) for part in location[:2]]
    table = _table(schema, names[0])
    if kind == "extra_forbidden":
        if len(names) == 1:
            tables = [f"[{name}]" for name in schema["properties"]]
            return f"unknown table [{names[0]}]{_near(f'[{names[0]}]', tables)}: must be one of {', '.join(tables)}"
        keys = list(table["properties"])
        hint = _near(names[1], keys) or _elsewhere(names[1], schema)
        return f"[{names[0]}] unknown key {names[1]}{hint}: must be one of {', '.join(keys)}"
    if len(names) == 1:
        state = "is missing" if kind == "missing" else f"= {shown(value)}: must be a table"
        return f"[{names[0]}] {state}"
    part = table["properties"][names[1]]
    if kind == "missing" and len(location) == 2:
        return f"[{names[0]}] {names[1]} is missing: must be {allowed(part, schema)}"
    entry = next((index for index in location[2:] if isinstance(index, int)), None)
    # What is missing inside a value is reported with that value as a whole.
    if entry is not None and kind != "missing":
        part = _entry(part, entry, schema)
        names[1] += f"[{entry}]"
    return f"[{names[0]}] {names[1]} = {shown(value)}: {_rule(details, allowed(part, schema))}"


def _rule(details: ErrorDetails, allowed: str) -> str:
    raised = details.get("ctx", {}).get("error")
    if raised is not None:
        # The validators' own words; those of the library functions repeat the key and the value first.
        text = str(raised)
        start = text.find(": must ")
        return text[start + 2 :] if start >= 0 else text
    if details["type"] == "finite_number":
        return f"must be {allowed}, and finite"
    return f"must be {allowed}"


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _elsewhere(key: str, schema: Schema) -> str:
    """A hint at the table that has a key."""
    tables = [name for name in schema["properties"] if key in _table(schema, name).get("properties", {})]
    return f" (it is a key of {' and '.join(f'[{name}]' for name in tables)})" if tables else ""


def shown(value: Any) -> str:
    """A value as the file has it, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:
        text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def _table(schema: Schema, name: str) -> Schema:
    return resolved(schema["properties"].get(name, {"properties": {}}), schema)


def resolved(part: Schema, schema: Schema) -> Schema:
    """The part itself, or the definition that it refers to."""
    reference = part.get("$ref")
    return part if reference is None else schema["$defs"][reference.rsplit("/", 1)[1]]


def _entry(part: Schema, index: int, schema: Schema) -> Schema:
    """The schema of one entry of a list."""
    choices = [resolved(choice, schema) for choice in part.get("anyOf", [part])]
    lists = next(choice for choice in choices if choice.get("type") == "array")
    entries = lists.get("prefixItems")
    found: Schema = entries[index] if entries else lists["items"]
    return found


def allowed(part: Schema, schema: Schema) -> str:
    """The values that a JSON schema allows, in words that follow `must be`."""
    part = resolved(part, schema)
    if "anyOf" in part:
        words = dict.fromkeys(allowed(choice, schema) for choice in part["anyOf"] if choice.get("type") != "null")
        return " or ".join(words)
    if "enum" in part:
        return "one of " + ", ".join(str(choice) for choice in part["enum"])
    if "const" in part:
        return str(part["const"])
    match part.get("type"):
        case "integer":
            return "an integer" + _bounds(part)
        case "number":
            return "a number" + _bounds(part)
        case "boolean":
            return "true or false"
        case "array":
            return _list(part, schema)
        case "object":
            return "a table"
        case _:
            return "a string"


def _list(part: Schema, schema: Schema) -> str:
    entries = part.get("prefixItems") or [part.get("items", {})]
    each = " or ".join(dict.fromkeys(allowed(entry, schema) for entry in entries))
    if "prefixItems" in part:
        count = f"{len(entries)} entries"
    else:
        count = f"at least {part['minItems']} entry" if "minItems" in part else "entries"
    return f"a list of {count}, each {each}"


def _bounds(part: Schema) -> str:
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "greater than",
        "maximum": "of at most",
        "exclusiveMaximum": "less than",
    }
    present = [
        f"{word} {_plain(part[bound])}"
        for bound, word in words.items()
        if bound in part and part[bound] != _LARGEST_INTEGER
    ]
    return " " + " and ".join(present) if present else ""


def _plain(bound: float) -> float:
    """Return a whole number as an integer: releases of pydantic give the bounds of a float as 0 or as 0.0."""
    return int(bound) if bound == int(bound) else bound
