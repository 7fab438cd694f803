"""Forecasts that are computed lead by lead and handed on while the solve goes on: none is held whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from pnode_dist.problems.common.forecast_model import Rollouts, Take

Forecast = nn.Module | Callable[[int], torch.Tensor] | torch.Tensor
"""A forecast of the windows of a batch: a model that is solved for them, a function of the lead that returns the states
`[window, *local_shape]`, or all states `[lead, window, *local_shape]`."""


class Stretches(Protocol):
    """Windows of data that are forecast, by number."""

    @property
    def starts(self) -> Sequence[Any]: ...

    @property
    def leads(self) -> range: ...

    def part(self, begin: int, end: int, dtype: torch.dtype) -> Any:
        """Return the windows `begin` to `end`, in `dtype`."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """A model that hands on its forecast while it is solved, such as `Rollouts`."""

    def stream(self, batch: Any, take: Take) -> None:
        """Hand the states of each lead to `take`."""
        ...


class Row(NamedTuple):
    """The forecast of some windows of a batch at one lead.

    `starts` are the numbers of the windows in the batch, `lead` is 1, 2, ..., and `states` `[window, *local_shape]` are
    in float64, in the units that are solved for.
    """

    lead: int
    starts: Sequence[int]
    states: torch.Tensor


@runtime_checkable
class Reduction(Protocol):
    """A figure of an evaluation that is computed from forecasts, lead by lead."""

    def add(self, name: str, row: Row) -> None:
        """Take a part of the forecast `name`, such as `model`. Called in the same order on all state ranks."""
        ...

    def result(self) -> Any:
        """Return the figure after the last part. Collective on the world."""
        ...


def each_lead(
    forecast: Forecast, batch: Stretches, size: int, dtype: torch.dtype, take: Callable[[Row], None]
) -> float:
    """Compute a forecast without a gradient, and hand each part of it to `take`. Collective on the state ranks.

    A model is solved for `size` windows at once, in `dtype`. Returns the seconds that the forecast itself took.
    """
    began, spent = time.perf_counter(), 0.0

    def timed(lead: int, starts: Sequence[int], states: torch.Tensor) -> None:
        nonlocal spent
        given = time.perf_counter()
        take(Row(lead, starts, states.detach().cpu().double()))
        spent += time.perf_counter() - given

    with torch.no_grad():
        if isinstance(forecast, nn.Module):
            _each_lead_of_model(forecast, batch, size, dtype, timed)
        else:
            every = range(len(batch.starts))
            for lead in batch.leads:
                timed(lead, every, forecast[lead - 1] if isinstance(forecast, torch.Tensor) else forecast(lead))
    return time.perf_counter() - began - spent


def _each_lead_of_model(
    model: nn.Module,
    batch: Stretches,
    size: int,
    dtype: torch.dtype,
    take: Take,
) -> None:
    if isinstance(model, Rollouts) and model.evaluated_in is not None:
        dtype = model.evaluated_in
    for first in range(0, len(batch.starts), size):
        part = batch.part(first, first + size, dtype)
        if isinstance(model, Streaming):

            def numbered(lead: int, windows: Sequence[int], states: torch.Tensor, first: int = first) -> None:
                take(lead, [first + number for number in windows], states)

            model.stream(part, numbered)
        else:
            numbers = range(first, first + len(part.starts))
            for lead, states in zip(part.leads, model(part), strict=True):
                take(lead, numbers, states)
