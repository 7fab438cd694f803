"""Known discontinuities of f in time: steps end there, and f is evaluated on the step's side of them.

At a jump f has two values: the one before it belongs to the step that ends there, the other one to the step that
begins there. f gets the nearest number on the step's side in place of the time itself, like with `jump_t` of
torchdiffeq and `jump_ts` of diffrax. So f need not be continuous from any side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError


class SmoothInterval:
    """The times between two successive jumps, `low` and `high`; infinite where there is no jump on that side."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self._limits: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def between_all(cls, jumps: Sequence[float], direction: float) -> list[SmoothInterval]:
        """Return the intervals before, between and after jumps in the order of steps; `direction` has their sign."""
        forever = math.copysign(math.inf, direction)
        return [cls(*sorted(pair)) for pair in pairwise([-forever, *jumps, forever])]

    def inside(self, time: torch.Tensor) -> torch.Tensor:
        """Return `time`, or the nearest number of its type inside the interval. Its derivative stays 1."""
        value = time.detach()
        low, high = self._limits_of(value)
        return torch.clamp(value, low, high) + (time - value)

    def number_inside(self, time: float, dtype: torch.dtype) -> float:
        """Return `time` rounded to `dtype`, or the nearest number of that type inside the interval."""
        value = torch.scalar_tensor(time, dtype=dtype)
        low, high = self._limits_of(value)
        return float(torch.clamp(value, low, high))

    def holds(self, time: float, dtype: torch.dtype) -> bool:
        """Return True if `time`, rounded to `dtype`, is inside the interval."""
        value = torch.scalar_tensor(time, dtype=dtype)
        low, high = self._limits_of(value)
        return bool(low <= value) and bool(value <= high)

    def _limits_of(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first and the last number of a type inside the interval."""
        key = like.dtype, like.device
        if key not in self._limits:
            low = torch.tensor(self.low, dtype=like.dtype)
            high = torch.tensor(self.high, dtype=like.dtype)
            after = torch.nextafter(low, torch.tensor(math.inf, dtype=like.dtype)) if self.low > -math.inf else low
            before = torch.nextafter(high, torch.tensor(-math.inf, dtype=like.dtype)) if self.high < math.inf else high
            self._limits[key] = after.to(like.device), before.to(like.device)
        return self._limits[key]


def checked_jumps(jumps: Any) -> tuple[float, ...]:
    """Return the times of jumps as sorted numbers; none for None. Raises `ConfigurationError` for anything else."""
    if jumps is None:
        return ()
    if isinstance(jumps, torch.Tensor):
        if jumps.dim() != 1:
            raise ConfigurationError(f"jumps: must be one-dimensional, got shape {tuple(jumps.shape)}")
        if jumps.requires_grad:
            raise ConfigurationError(
                "jumps: cannot require a gradient: the times of jumps are constant, pass a detached copy"
            )
        jumps = jumps.tolist()
    try:
        times = tuple(sorted({float(time) for time in jumps}))
    except (TypeError, ValueError):
        raise ConfigurationError(f"jumps = {jumps!r}: must be a sequence of times") from None
    if not all(map(math.isfinite, times)):
        raise ConfigurationError(f"jumps = {list(times)}: must be finite times")
    return times


def check_times_off_jumps(times: Sequence[float], jumps: Sequence[float]) -> None:
    """Raise `ConfigurationError` for an output time inside a solve, with a gradient, that is a jump.

    The state has a kink there, so its derivatives with respect to the time from both sides differ.
    """
    at = set(jumps)
    for number, time in enumerate(times[1:-1], start=1):
        if time in at:
            raise ConfigurationError(
                f"t requires a gradient, and t[{number}] = {time:g} is one of jumps: the state has no derivative with "
                "respect to a time at which du/dt jumps"
            )
