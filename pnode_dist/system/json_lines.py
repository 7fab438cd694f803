"""Records as lines of JSON."""

from __future__ import annotations

import json
import math
from typing import Any


def json_line(record: dict[str, Any]) -> str:
    """Return a record as one line of JSON. Numbers that are not finite become null."""
    return json.dumps(_finite(record), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
