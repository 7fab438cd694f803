"""The choice of the levels of a variable that become channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pnode_dist.errors import ConfigurationError

Array = npt.NDArray[Any]
_SHOWN = 12
# float32 coordinates hold 0.1 as 0.10000000149.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class LevelChoice:
    """One level or several, by the value of their coordinate or by their index; without either, all of them.

    One level that is chosen alone (`alone`) leaves no dimension behind.
    """

    values: tuple[float | str, ...] | None = None
    indices: tuple[int, ...] | None = None
    alone: bool = False

    @property
    def is_all(self) -> bool:
        """True if no level is chosen."""
        return self.values is None and self.indices is None


ALL_LEVELS = LevelChoice()


def chosen_levels(choice: LevelChoice, name: str, size: int, values: Array | None) -> tuple[int, ...]:
    """The indices of the chosen levels along the dimension `name`, in the order in which they are chosen.

    Raises `ConfigurationError` for a level that is not there or is chosen twice; the nearest one is never taken.
    """
    if choice.indices is not None:
        indices = choice.indices
        if not all(0 <= index < size for index in indices):
            raise ConfigurationError(
                f"[problem] level = {{ index = {_plain(indices)} }}: must be from 0 to {size - 1}, as {name} has {size}"
            )
    elif choice.values is not None:
        if values is None:
            raise ConfigurationError(
                f"[problem] level = {_plain(choice.values)}: {name} has no values: write level = {{ index = 0 }} with "
                f"an index from 0 to {size - 1}"
            )
        indices = tuple(_index(wanted, choice, name, values) for wanted in choice.values)
    else:
        return tuple(range(size))
    if len(set(indices)) < len(indices):
        raise ConfigurationError(f"[problem] level = {_plain(choice.values or indices)}: must name no level twice")
    return indices


def _index(wanted: float | str, choice: LevelChoice, name: str, values: Array) -> int:
    numeric = values.dtype.kind in "fiu"
    if numeric and not isinstance(wanted, str):
        matches = np.flatnonzero(np.isclose(values.astype(np.float64), wanted, rtol=_ROUNDING, atol=0))
    else:
        matches = np.flatnonzero(np.array([str(value) == str(wanted) for value in values]))
    if len(matches) != 1:
        known = ", ".join(label_of(value) for value in values[:_SHOWN]) + (", ..." if len(values) > _SHOWN else "")
        raise ConfigurationError(
            f"[problem] level = {_plain(choice.values or ())}: {name} has {len(matches)} levels {wanted}; "
            f"its levels are {known}"
        )
    return int(matches[0])


def label_of(value: Any) -> str:
    """A level's value for people."""
    return f"{float(value):g}" if np.asarray(value).dtype.kind in "fiu" else str(value)


def _plain(values: Sequence[Any]) -> str:
    return repr(values[0]) if len(values) == 1 else str(list(values))
