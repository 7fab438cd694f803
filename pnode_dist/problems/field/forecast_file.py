"""States of a field as one NetCDF-4 file, with the dates and the coordinates of the field's own files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.calendar import encoded
from pnode_dist.problems.common.forecast_file import TRUTH
from pnode_dist.problems.common.forecast_stream import Row
from pnode_dist.problems.common.gridded import Variable as Source
from pnode_dist.problems.field.data import Field
from pnode_dist.problems.field.model import Windows
from pnode_dist.report.dataset_file import Later, OtherChannels, Variable, write_dataset
from pnode_dist.report.dataset_stream import DatasetStream

_FORECASTS = ("start", "lead", "valid_time", "forecast", "truth")
"""Names of a file of forecasts that the field's own dimensions and coordinates cannot have."""


class ForecastFile:
    """The file of the forecasts of a batch, written lead by lead. It is a context manager like `DatasetStream`.

    The variables are `forecast` and `truth`, or `NAME_forecast` and `NAME_truth` for each of several variables. Their
    dimensions are start, lead, y, x, and level if levels are channels. The last three have the names and coordinates of
    the data. Values are in the field's units, NaN outside its mask. No rank holds more than its own part.

    Creating it is collective on the world, and raises `ConfigurationError` on all ranks when it cannot be written.
    """

    def __init__(self, path: Path, batch: Windows, partition: GridPartition, mesh: Mesh) -> None:
        field, time = batch.field, batch.field.time
        starts, leads = np.array(batch.starts), np.array(batch.leads)
        dates = {
            "start": Variable(("start",), *encoded(time.stamps[starts], time.units)),
            "lead": Variable(("lead",), leads, {"long_name": "steps ahead of the start"}),
            "valid_time": Variable(("start", "lead"), *encoded(time.stamps[np.add.outer(starts, leads)], time.units)),
        }
        later = Later((len(starts), len(leads)))
        kinds = {"forecast": later, TRUTH: later}
        variables, axes = _variables(field, dates, ("start", "lead"), kinds, _FORECASTS, partition)
        self.stream = DatasetStream(path, variables, mesh, {"title": f"Forecasts of {field.name}"}, bare=axes)
        self._batch = batch

    def __enter__(self) -> Self:
        self.stream.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.__exit__(kind, error, trace)

    def write(self, kind: str, row: Row) -> None:
        """Write a part of the `forecast` or of the `truth`. Collective on the state ranks."""
        field = self._batch.field
        values = field.physical(row.states).masked_fill(field.inside == 0, math.nan)
        mask = self._batch.mask(row.lead) if kind == TRUTH else None
        if mask is not None:
            values = values.masked_fill(mask[list(row.starts)] == 0, math.nan)
        place = (slice(row.starts[0], row.starts[-1] + 1), row.lead - 1)
        for source in field.data.variables:
            self.stream.write(_named(source, kind, field), place, _channels(source, values))


def write_states(
    path: Path,
    field: Field,
    indices: Sequence[int],
    states: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Any],
    partition: GridPartition,
    mesh: Mesh,
) -> None:
    """Write all ranks' parts of several states at the time `indices` as one file. Collective on the world.

    `states` are `[time, ny_local, nx_local, channel]`, or without time, in the field's units. The variables have their
    names, or `NAME_` of the variable before it for each of several variables.

    Raises `ConfigurationError` on all ranks when the file cannot be written.
    """
    dates = {"time": Variable(("time",), *encoded(field.time.stamps[np.array(indices)], field.time.units))}
    variables, axes = _variables(field, dates, ("time",), states, ("time", *states), partition)
    write_dataset(path, variables, mesh, attributes, bare=axes)


def _variables(
    field: Field,
    dates: Mapping[str, Variable],
    leading: Sequence[str],
    kinds: Mapping[str, torch.Tensor | Later],
    taken: Collection[str],
    partition: GridPartition,
) -> tuple[dict[str, Variable], list[str]]:
    """Return the variables of a file, and the names of the field's axes.

    `kinds` are the states of each kind, or the leading shape of those that are written later.
    """
    data = field.data
    coordinates = {**dates, **_places(field, taken)}
    coordinates = {name: one for name, one in coordinates.items() if np.asarray(one.values).dtype.kind in "bfiuSU"}
    beside = " ".join(name for name, variable in coordinates.items() if variable.dimensions != (name,))
    stored = {}
    for source in data.variables:
        level = () if source.level is None else (source.level.name,)
        names = tuple(_free(name, taken) for name in (data.y.name, data.x.name, *level))
        own = OtherChannels(partition, len(range(field.channels)[source.channels]) if level else None)
        for kind, values in kinds.items():
            if isinstance(values, Later):
                part: Any = Later((*values.shape, *own.local_shape))
            else:
                part = _channels(source, values)
            # A state of one time has no leading dimension.
            before = tuple(leading)[: len(part.shape) - len(own.local_shape)]
            title = f"{source.name}, {kind.replace('_', ' ')}"
            told = {"long_name": title, "coordinates": beside, "units": source.units}
            stored[_named(source, kind, field)] = Variable((*before, *names), part, told, np.float32, own)
    axes = [_free(axis.name, taken) for axis in (data.y, data.x, *_levels(field).values())]
    return {**coordinates, **stored}, axes


def _named(source: Source, kind: str, field: Field) -> str:
    """Return the name of the states of one kind of a variable of the field."""
    return f"{source.name}_{kind}" if len(field.data.variables) > 1 else kind


def _channels(source: Source, values: torch.Tensor) -> torch.Tensor:
    """Return the channels of one variable of the field, along its levels if it has levels."""
    part = values[..., source.channels]
    return part[..., 0] if source.level is None else part


def _levels(field: Field) -> dict[str, Any]:
    return {variable.level.name: variable.level for variable in field.data.variables if variable.level is not None}


def _free(name: str, taken: Collection[str]) -> str:
    """Return a name of the data, prefixed if it clashes with a name of the file itself."""
    return f"field_{name}" if name in taken else name


def _places(field: Field, taken: Collection[str]) -> dict[str, Variable]:
    """Return the coordinates of the field's axes, and those beside them."""
    data, found = field.data, {}
    for axis in (data.y, data.x, *_levels(field).values()):
        if axis.given:
            found[_free(axis.shown, taken)] = Variable((_free(axis.name, taken),), axis.values, axis.attributes)
    for coordinate in data.coordinates:
        dimensions = tuple(_free(name, taken) for name in coordinate.dimensions)
        found[_free(coordinate.name, taken)] = Variable(dimensions, coordinate.load(), coordinate.attributes)
    return found
