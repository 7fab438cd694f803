"""The rules that accept steps and choose their sizes, and the functions that are called at each step.

`StepRule` is torchdiffeq's, and `PidRule` is a PID controller with diffrax's meaning of its coefficients.

E. Hairer, S. P. Norsett, G. Wanner: Solving Ordinary Differential Equations I, 2nd ed., section II.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.time_grid import TimeGrid

Ratios = tuple[float, float, float]
"""Errors relative to the tolerance: of this attempt, and of the last two accepted steps before it, 1 without one."""

StepCallback = Callable[[torch.Tensor, Any, torch.Tensor], Any]


@dataclass(frozen=True)
class StepRule:
    """The settings of the rule. Sizes of steps are positive, also where time decreases.

    - `safety`: the share of the size at which the error would meet the tolerance. `ifactor`, `dfactor`: the largest and
      the least ratio of a size to the one before.
    - `min_step`, `max_step`: the bounds of sizes. A step that is not longer than `min_step` is always accepted.
    - `max_num_steps`: the most attempts between two output times.
    - `error_scale`: a factor of the method's error estimate.
    - `norm`: the norm of the error relative to the tolerances, of a state as f gets it. By default the root mean square
      over all entries of a part on all ranks, and the largest of these over the parts (`norm_of_parts`).
    """

    norm_of_parts: ClassVar[bool] = True

    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    min_step: float = 0.0
    max_step: float = math.inf
    max_num_steps: int = 2**31 - 1
    error_scale: float = 1.0
    norm: Callable[[Any], Any] | None = None

    def accepts(self, size: float, ratio: float) -> bool:
        """Return True for a step of this size whose error is `ratio` times the tolerance."""
        return ratio <= 1 or (size <= self.min_step and math.isfinite(ratio))

    def next_size(self, size: float, ratios: Ratios, order: int) -> float:
        """Return the size that follows a step of a method of this order; NaN if the error is not finite."""
        ratio, *_ = ratios
        if not math.isfinite(ratio):
            return math.nan
        least = 1.0 if ratio < 1 else self.dfactor
        wanted = math.inf if ratio == 0 else self.safety / ratio ** (1 / order)
        return self.limited(size * min(self.ifactor, max(wanted, least)))

    def limited(self, size: float) -> float:
        """Return the size within `min_step` and `max_step`."""
        return min(max(size, self.min_step), self.max_step)


@dataclass(frozen=True)
class PidRule(StepRule):
    """The settings of a PID controller, with the names and formulas of diffrax's `PIDController`.

    With d_n the tolerance over the error of step n, and k the order of the method, the size is multiplied by
    safety * d_n^((p + i + d) / k) * d_(n-1)^(-(p + 2 d) / k) * d_(n-2)^(d / k). An accepted step is never followed by
    a shorter one, and the repetition of a rejected step is shorter by the factor `safety` at least.

    The norm of the error is the root mean square over all entries of the state on all ranks. The coefficients default
    to integral control. Raises `ConfigurationError` for coefficients that are not finite or whose sum is not positive.

    G. Soederlind: Digital filters in adaptive time-stepping, ACM Trans. Math. Softw. 29 (2003).
    """

    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0

    norm_of_parts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        coefficients = {name: getattr(self, name) for name in COEFFICIENTS}
        for name, value in coefficients.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigurationError(f"{name} = {value!r}: must be a finite number")
        if not sum(coefficients.values()) > 0:
            words = ", ".join(f"{name} = {value!r}" for name, value in coefficients.items())
            raise ConfigurationError(f"{words}: their sum must be positive, or a larger error would not shorten a step")

    def next_size(self, size: float, ratios: Ratios, order: int) -> float:
        """See `StepRule.next_size`."""
        ratio, previous, earlier = ratios
        if not math.isfinite(ratio):
            return math.nan
        if ratio == 0:
            return size * self.ifactor
        p, i, d = self.pcoeff / order, self.icoeff / order, self.dcoeff / order
        factor: float = self.safety * ratio ** -(p + i + d) * previous ** (p + 2 * d) * earlier**-d
        least, most = (1.0, self.ifactor) if ratio <= 1 else (self.dfactor, self.safety)
        return size * min(max(factor, least), most)


COEFFICIENTS = ("pcoeff", "icoeff", "dcoeff")


@dataclass(frozen=True)
class StepCallbacks:
    """Functions `callback(t, u, h)` that are called at each step, not where a step is recomputed.

    `step` is called before each attempt of a step of size h from the state u at t, `accept` and `reject` after it.
    `reached` is called after each step that was taken, with its end t, the state u there, and h. `pulled_back` is
    called at the end of the backward pass for each step in its order, with the start t of the step and None in place of
    u. u is a copy in the form and type of the caller's state. h is positive. t and h are doubles.
    """

    step: StepCallback | None = None
    accept: StepCallback | None = None
    reject: StepCallback | None = None
    reached: StepCallback | None = None
    pulled_back: StepCallback | None = None

    @property
    def see_steps(self) -> bool:
        """True if a function is called between steps of a given size."""
        return self.step is not None or self.reached is not None


NO_CALLBACKS = StepCallbacks()


def call_back(callback: StepCallback | None, layout: StateLayout, time: float, parts: Parts, size: float) -> None:
    """Call `callback` for a step of this size from or to the state `parts`, if there is one."""
    if callback is None:
        return
    copies = tuple(part.detach().to(layout.device, layout.dtype, copy=True) for part in parts)
    when, length = (torch.tensor(x, dtype=torch.float64, device=layout.device) for x in (time, abs(size)))
    callback(when, layout.as_state(copies), length)


def call_back_reversed(callback: StepCallback | None, grid: TimeGrid | None) -> None:
    """Call `callback`, if there is one, for each step of `grid` from the last to the first."""
    if callback is None or grid is None:
        return
    for start, size in zip(reversed(grid.starts), reversed(grid.sizes), strict=True):
        when, length = (torch.tensor(x, dtype=torch.float64) for x in (start, abs(size)))
        callback(when, None, length)
