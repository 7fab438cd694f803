"""JSON without extensions: no NaN, no infinity, no repeated keys, in either direction."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def parsed(text: bytes) -> Any:
    """Parse a document in UTF-8. Raises `ValueError` in one line for anything that is not JSON or repeats a key."""
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    try:
        return json.loads(decoded, parse_constant=_refuse_constant, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def written(value: Any) -> bytes:
    """Write a document in UTF-8. Raises `ValueError` for a number that is not finite."""
    return json.dumps(value, allow_nan=False).encode()


def number(value: Any) -> float | None:
    """Return a parsed value as a finite number in double precision; None if it is something else."""
    # True and False are integers in Python, and not numbers in JSON.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated[:60]!r} is repeated")
    return found
