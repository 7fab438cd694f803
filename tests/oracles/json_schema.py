"""JSON Schema, draft 2020-12: whether a schema is one, and what in a value it refuses.

It has the keywords of this project's schemas, with the rules of the draft's meta-schemas. Any other is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

TYPES: dict[str, Callable[[Any], bool]] = {
    "array": lambda value: isinstance(value, list),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: not isinstance(value, bool) and isinstance(value, int | float) and value == int(value),
    "null": lambda value: value is None,
    "number": lambda value: not isinstance(value, bool) and isinstance(value, int | float),
    "object": lambda value: isinstance(value, dict),
    "string": lambda value: isinstance(value, str),
}


def _count(value: Any) -> bool:
    return TYPES["integer"](value) and value >= 0


def _names(value: Any) -> bool:
    return isinstance(value, list) and len(set(value)) == len(value) and all(isinstance(name, str) for name in value)


_ANYTHING: Callable[[Any], bool] = lambda value: True  # noqa: E731
KEYWORDS: dict[str, Callable[[Any], bool]] = {
    "$schema": lambda value: isinstance(value, str) and bool(re.match(r"https://\S+$", value)),
    "$ref": TYPES["string"],
    "title": TYPES["string"],
    "description": TYPES["string"],
    "default": _ANYTHING,
    "const": _ANYTHING,
    "examples": TYPES["array"],
    "enum": TYPES["array"],
    "type": lambda value: value in TYPES,
    "minimum": TYPES["number"],
    "maximum": TYPES["number"],
    "exclusiveMinimum": TYPES["number"],
    "exclusiveMaximum": TYPES["number"],
    "multipleOf": lambda value: TYPES["number"](value) and value > 0,
    "minItems": _count,
    "maxItems": _count,
    "minLength": _count,
    "required": _names,
}
ONE = ("items", "additionalProperties")
SEVERAL = ("prefixItems", "anyOf")
BY_NAME = ("$defs", "properties")


def check_schema(schema: Any, root: Any = None) -> None:
    """Raise `AssertionError` for what is no schema."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return
    assert isinstance(schema, dict), schema
    for keyword, value in schema.items():
        if keyword in ONE:
            check_schema(value, root)
        elif keyword in SEVERAL:
            assert isinstance(value, list), (keyword, value)
            assert value, keyword
            for part in value:
                check_schema(part, root)
        elif keyword in BY_NAME:
            assert isinstance(value, dict), (keyword, value)
            for part in value.values():
                check_schema(part, root)
        else:
            assert KEYWORDS[keyword](value), (keyword, value)
        if keyword == "$ref":
            referred(value, root)


def referred(reference: str, root: Any) -> Any:
    """The part of a schema that a reference within it names."""
    found = root
    start, *names = reference.split("/")
    assert start == "#"
    for name in names:
        found = found[name.replace("~1", "/").replace("~0", "~")]
    return found


def refused(value: Any, schema: Any, root: Any = None, place: str = "") -> Iterator[str]:
    """The places of a value at which the schema refuses it, with the keyword."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        if not schema:
            yield f"{place} false"
        return
    if "$ref" in schema:
        yield from refused(value, referred(schema["$ref"], root), root, place)
    if "type" in schema and not TYPES[schema["type"]](value):
        yield f"{place} type"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{place} const"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place} enum"
    if "anyOf" in schema and all(any(refused(value, part, root, place)) for part in schema["anyOf"]):
        yield f"{place} anyOf"
    if TYPES["number"](value):
        yield from (f"{place} {keyword}" for keyword in _beyond(value, schema))
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{place} length"
        for number, entry in enumerate(value):
            part = first[number] if number < len(first) else schema.get("items", True)
            yield from refused(entry, part, root, f"{place}/{number}")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        yield from (f"{place}/{name} required" for name in schema.get("required", []) if name not in value)
        for name, entry in value.items():
            part = properties.get(name, schema.get("additionalProperties", True))
            yield from refused(entry, part, root, f"{place}/{name}")


def _beyond(value: float, schema: Any) -> Iterator[str]:
    bounds: dict[str, Callable[[float], bool]] = {
        "minimum": lambda bound: value >= bound,
        "maximum": lambda bound: value <= bound,
        "exclusiveMinimum": lambda bound: value > bound,
        "exclusiveMaximum": lambda bound: value < bound,
        "multipleOf": lambda bound: value % bound == 0,
    }
    yield from (keyword for keyword, holds in bounds.items() if keyword in schema and not holds(schema[keyword]))
