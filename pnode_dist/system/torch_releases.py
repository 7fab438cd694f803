"""Differences between the releases of torch that the package supports, from 2.6 on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def known_options(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Return those of `options` that `function` takes in this release of torch.

    Only for options that older releases lack and whose absence changes no result: say there what it changes.
    """
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}
