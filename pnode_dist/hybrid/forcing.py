"""Inputs of a right-hand side that are known at given times, interpolated between them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.hybrid.slopes import difference_slopes, spline_slopes
from pnode_dist.hybrid.times import times_of
from pnode_dist.ode.autograd.transforms import is_batched

_CONTINUOUS = {"previous": -1, "next": -1, "linear": 0, "hermite": 1, "cubic": 2}
"""The kinds of interpolants, with the order of the highest derivative that is continuous at a knot; -1: none."""
KINDS = tuple(_CONTINUOUS)
OUTSIDE = ("raise", "hold", "periodic")


class _Place(NamedTuple):
    """The knots around times: their numbers, the time of the earlier one, and their distance."""

    earlier: Any
    later: Any
    begin: Any
    length: Any


class Forcing(nn.Module):
    """A function of time through `values` `[n, ...]` at `times` `[n]`: `forcing(t)` has the shape `[*t.shape, ...]`.

    - `kind`: "previous" and "next" are steps, with the value of the knot before or after; "linear"; "cubic" is the
      natural cubic spline; "hermite" is the cubic with `slopes` `[n, ...]` at the knots, by default those of parabolas
      through three successive values.
    - `outside` chooses what happens before the first and after the last time. "raise": a `ConfigurationError`, or NaN
      in compiled code and under torch.func.vmap. "hold": the value at the end. "periodic": `period`, which is longer
      than `times`, is the distance after which everything repeats.
    - `unit`: the unit of `t` if `times` are dates (numpy.datetime64), such as "h" or "D"; `origin` is the date of
      t = 0, by default the first one.

    `values` and `slopes` are buffers, or parameters if they are an `nn.Parameter`. Other tensors that require a
    gradient stay as they are. The result is differentiable in them and in `t`. On several ranks `values` are those of
    this rank's part. Raises `ConfigurationError` for arguments that do not fit.
    """

    values: torch.Tensor
    slopes: torch.Tensor | None

    def __init__(
        self,
        times: Any,
        values: Any,
        *,
        kind: str = "linear",
        slopes: Any = None,
        outside: str = "raise",
        period: float | None = None,
        unit: str | None = None,
        origin: Any = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigurationError(f"kind = {kind!r}: must be one of {', '.join(KINDS)}")
        if outside not in OUTSIDE:
            raise ConfigurationError(f"outside = {outside!r}: must be one of {', '.join(OUTSIDE)}")
        if slopes is not None and kind != "hermite":
            raise ConfigurationError(f"slopes: kind = {kind!r} has its own: must be None, or kind = 'hermite'")
        self.kind, self.outside = kind, outside
        knots = _numbers(times, unit, origin)
        self._knots = tuple(knots.tolist())
        self.period = self._checked_period(period)
        self._ends = (*self._knots, self._knots[0] + self.period) if self.period else self._knots
        # No buffer, because a module that is converted to a shorter type would lose knots.
        self._times = torch.tensor(self._ends, dtype=torch.float64)
        self._keep("values", values)
        self._slope_columns: torch.Tensor | None = None
        self._slope_weights: torch.Tensor | None = None
        if slopes is not None:
            self._keep("slopes", slopes)
        else:
            self._derive_slopes()

    @classmethod
    def from_xarray(cls, array: Any, time: str = "time", **settings: Any) -> Forcing:
        """Return the forcing of an xarray.DataArray with a coordinate `time`, whose axis becomes the first one.

        `settings` are the keywords of `Forcing`. Raises `ConfigurationError` for an array without that axis.
        """
        if time not in getattr(array, "dims", ()) or time not in array.coords:
            raise ConfigurationError(f"time = {time!r}: must be an axis with a coordinate, one of {array.dims}")
        return cls(array[time].values, array.transpose(time, ...).values, **settings)

    @property
    def knots(self) -> tuple[float, ...]:
        """The times of the values, as numbers."""
        return self._knots

    @property
    def jumps(self) -> tuple[float, ...]:
        """The knots at which the value or the slope jumps, for `jumps` of `odeint`.

        Raises `ConfigurationError` if it is periodic: `jumps_between` returns those of a span.
        """
        if self.period:
            raise ConfigurationError("jumps: a periodic forcing has no last one: call jumps_between(begin, end)")
        return self.jumps_between(self._knots[0], self._knots[-1])

    def jumps_between(self, begin: float, end: float, derivative: int = 1) -> tuple[float, ...]:
        """Return the times from `begin` to `end` at which a derivative up to this order jumps; 0: the value itself."""
        low, high = sorted((float(begin), float(end)))
        if self.period:
            first, last = ((time - self._knots[0]) // self.period for time in (low, high))
            periods = np.arange(first, last + 1) * self.period
            every = (periods[:, None] + np.array(self._knots)).ravel().tolist()
        else:
            every = [*self._knots]
        if _CONTINUOUS[self.kind] >= derivative:
            every = [self._knots[0], self._knots[-1]] if self.outside == "hold" and derivative > 0 else []
        return tuple(time for time in every if low <= time <= high)

    def forward(self, t: torch.Tensor | float) -> torch.Tensor:
        """Return the values at the times `t`, `[*t.shape, ...]`."""
        if not isinstance(t, torch.Tensor):
            t = torch.tensor(t, dtype=torch.float64)
        alone = t.dim() == 0 and t.is_cpu and not torch.compiler.is_compiling() and not is_batched(t)
        return self._at_one(t) if alone else self._at_many(t)

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return f"kind={self.kind!r}, outside={self.outside!r}, {len(self._knots)} knots"

    def _at_one(self, t: torch.Tensor) -> torch.Tensor:
        """Return the value at one time, whose interval is found on the host."""
        value = t.detach().item()
        first, last = self._ends[0], self._ends[-1]
        if self.period:
            shift = (value - first) // self.period * self.period
            t, value = t - shift, value - shift
        elif not first <= value <= last:
            excess = max(first - value, value - last)
            if self.outside == "raise" and not excess <= _rounding(t) * max(abs(value), abs(first), abs(last)):
                raise ConfigurationError(
                    f"t = {value:.17g}: the forcing is known from {first:.17g} to {last:.17g}: must be between them, "
                    "or outside = 'hold' or 'periodic'"
                )
            value = min(max(value, first), last)
            t = torch.tensor(value, dtype=torch.float64)
        count = len(self._knots)
        if self.kind == "next":
            return self.values[bisect_left(self._ends, value) % count]
        number = bisect_right(self._ends, value) - 1
        if self.kind == "previous":
            return self.values[number % count]
        number = min(number, len(self._ends) - 2)
        begin = self._ends[number]
        place = _Place(number, (number + 1) % count, begin, self._ends[number + 1] - begin)
        return self._interpolated(t, place)

    def _at_many(self, t: torch.Tensor) -> torch.Tensor:
        """Return the values at several times, or at one in compiled code, by operations on tensors alone."""
        ends = self._times.to(t.device)
        first, last, count = self._ends[0], self._ends[-1], len(self._knots)
        known = t.detach().to(torch.float64)
        refused: torch.Tensor | None = None
        if self.period:
            shift = torch.floor((known - first) / self.period) * self.period
            t, known = t - shift, known - shift
        else:
            outside = (known < first) | (known > last)
            excess = torch.maximum(first - known, known - last)
            largest = torch.clamp(known.abs(), min=max(abs(first), abs(last)))
            if self.outside == "raise":
                refused = ~(excess <= _rounding(t) * largest)
                self._refuse(refused, known)
            known = torch.clamp(known, first, last)
            t = torch.where(outside, known, t.to(torch.float64))
        if self.kind == "next":
            numbers = torch.remainder(torch.searchsorted(ends, known), count)
            found = _rows(self.values, numbers)
        else:
            numbers = torch.searchsorted(ends, known, right=True) - 1
            if self.kind == "previous":
                found = _rows(self.values, torch.remainder(numbers, count))
            else:
                numbers = torch.clamp(numbers, max=len(ends) - 2)
                begin = _rows(ends, numbers)
                place = _Place(numbers, torch.remainder(numbers + 1, count), begin, _rows(ends, numbers + 1) - begin)
                found = self._interpolated(t, place)
        if refused is None:
            return found
        return torch.where(_beside(refused, found), torch.full_like(found, float("nan")), found)

    def _refuse(self, refused: torch.Tensor, times: torch.Tensor) -> None:
        """Raise `ConfigurationError` for times outside, where their values can be read."""
        if torch.compiler.is_compiling() or is_batched(refused) or not bool(refused.any()):
            return
        raise ConfigurationError(
            f"t = {times[refused][0].item():.17g}: the forcing is known from {self._ends[0]:.17g} to "
            f"{self._ends[-1]:.17g}: must be between them, or outside = 'hold' or 'periodic'"
        )

    def _interpolated(self, t: torch.Tensor, place: _Place) -> torch.Tensor:
        """Return the interpolant inside the intervals of `place`."""
        values = self.values
        before, after = _rows(values, place.earlier), _rows(values, place.later)
        share = (t.to(torch.float64) - place.begin) / place.length
        s = _beside(share, before).to(values.device, _real_type(values))
        if self.kind == "linear":
            return (1 - s) * before + s * after
        first, last = self._slope(place.earlier), self._slope(place.later)
        h = place.length
        if isinstance(h, torch.Tensor):
            h = _beside(h, before).to(values.device, _real_type(values))
        rest = 1 - s
        turned = h * s * rest * (rest * first - s * last)
        found: torch.Tensor = rest * rest * (1 + 2 * s) * before + s * s * (3 - 2 * s) * after + turned
        return found

    def _slope(self, numbers: Any) -> torch.Tensor:
        """Return the slopes at knots."""
        if self.slopes is not None:
            return _rows(self.slopes, numbers)
        values, weights = self.values, self._slope_weights
        assert weights is not None
        chosen = _rows(weights.to(values.device, values.dtype), numbers)
        if self._slope_columns is None:
            combined: torch.Tensor = torch.tensordot(chosen, values, dims=1)
            return combined
        neighbours = _rows(values, _rows(self._slope_columns.to(values.device), numbers))
        products = neighbours * _beside(chosen, neighbours)
        return products.sum(chosen.dim() - 1)

    def _derive_slopes(self) -> None:
        """Set the slopes of values that are constant, or the weights from values to slopes."""
        self.slopes = None
        if self.kind not in ("hermite", "cubic"):
            return
        steps = np.diff(np.array(self._ends))
        if self.kind == "cubic":
            self._slope_weights = torch.from_numpy(spline_slopes(steps, bool(self.period)))
        elif len(self._knots) < 3:
            raise ConfigurationError(f"times: {len(self._knots)}: kind = 'hermite' without slopes needs three or more")
        else:
            columns, weights = difference_slopes(steps, bool(self.period))
            self._slope_columns, self._slope_weights = torch.from_numpy(columns), torch.from_numpy(weights)
        if not self.values.requires_grad:
            slopes = self._slope(torch.arange(len(self._knots)))
            del self.slopes
            self.register_buffer("slopes", slopes)
            self._slope_columns = self._slope_weights = None

    def _keep(self, name: str, given: Any) -> None:
        """Hold `given`, with a row for each knot, as a parameter, buffer or plain tensor."""
        tensor = given if isinstance(given, torch.Tensor) else torch.as_tensor(np.asarray(given))
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ConfigurationError(f"{name}: {tensor.dtype}: must be of a floating or complex type")
        if tensor.dim() == 0 or len(tensor) != len(self._knots):
            raise ConfigurationError(
                f"{name}: shape {tuple(tensor.shape)} for {len(self._knots)} times: must have a row for each"
            )
        if name == "slopes" and tensor.shape != self.values.shape:
            raise ConfigurationError(
                f"slopes: shape {tuple(tensor.shape)}: must be that of values, {tuple(self.values.shape)}"
            )
        if not bool(torch.isfinite(tensor.detach()).all()):
            raise ConfigurationError(f"{name}: must be finite")
        if isinstance(tensor, nn.Parameter) or tensor.requires_grad:
            setattr(self, name, tensor)
        else:
            # A copy: f may be evaluated again after the caller has changed an array.
            self.register_buffer(name, tensor.detach().clone())

    def _checked_period(self, period: float | None) -> float:
        """Return the period, 0 for none."""
        knots = self._knots
        if self.outside != "periodic":
            if period is not None:
                raise ConfigurationError(f"period = {period!r}: must be None, or outside = 'periodic'")
            if len(knots) < 2:
                raise ConfigurationError(f"times: {len(knots)}: must be two or more")
            return 0.0
        if not isinstance(period, int | float) or not period > knots[-1] - knots[0]:
            raise ConfigurationError(
                f"period = {period!r}: must be longer than the span of times, {knots[-1] - knots[0]:.17g}: the first "
                "value is repeated after it"
            )
        return float(period)


def _numbers(times: Any, unit: str | None, origin: Any) -> torch.Tensor:
    """Return the times of knots as numbers, strictly increasing."""
    values = times if isinstance(times, torch.Tensor) else np.asarray(times)
    if isinstance(values, np.ndarray) and values.dtype.kind == "M":
        if unit is None:
            raise ConfigurationError("unit = None: must be the unit of t for times that are dates, such as 's' or 'D'")
        try:
            one = np.timedelta64(1, unit)  # type: ignore[call-overload]
            start = values.ravel()[0] if origin is None else np.datetime64(origin)
            values = (values - start) / one
        except (TypeError, ValueError, IndexError) as error:
            raise ConfigurationError(f"unit = {unit!r}, origin = {origin!r}: {error}") from None
    elif unit is not None or origin is not None:
        raise ConfigurationError(f"unit = {unit!r}, origin = {origin!r}: must be None for times that are numbers")
    knots = times_of("times", values).detach()
    if knots.dim() != 1 or not len(knots) or not bool((knots.diff() > 0).all()):
        raise ConfigurationError(f"times: shape {tuple(knots.shape)}: must be a sequence that increases strictly")
    return knots


def _rows(values: torch.Tensor, numbers: Any) -> torch.Tensor:
    """Return rows of `values`, `[*numbers.shape, ...]`; a plain number selects one."""
    if not isinstance(numbers, torch.Tensor):
        return values[numbers]
    found = torch.index_select(values, 0, numbers.reshape(-1))
    return found.reshape((*numbers.shape, *values.shape[1:]))


def _beside(numbers: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return `numbers` with axes of length 1 at the end, to multiply `values` of the same first axes."""
    return numbers.reshape((*numbers.shape, *(1,) * (values.dim() - numbers.dim())))


def _real_type(values: torch.Tensor) -> torch.dtype:
    return values.real.dtype if values.is_complex() else values.dtype


def _rounding(t: torch.Tensor) -> float:
    return 4 * torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0
