"""The functions of torchdiffeq that are refused by name."""

from __future__ import annotations

from typing import Any, NoReturn

from pnode_dist.errors import ConfigurationError


def odeint_dense(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise `ConfigurationError`: there is no interpolant of the solution."""
    raise ConfigurationError("odeint_dense: no interpolant of the solution is made: call odeint with every time in t")
