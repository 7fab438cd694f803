"""States of a field as one NetCDF-4 file, with the dates and the coordinates of the field's own files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.calendar import encoded
from pnode_dist.problems.common.gridded import Variable as Source
from pnode_dist.problems.field.data import Field
from pnode_dist.report.dataset_file import OtherChannels, Variable, write_dataset

_FORECASTS = ("start", "lead", "valid_time", "forecast", "truth")
"""Names of a file of forecasts that the field's own dimensions and coordinates cannot have."""


@dataclass(frozen=True)
class Forecast:
    """This rank's part of the forecasts from the time indices `starts`, and of the truth.

    `forecast` and `truth` are `[start, lead, ny_local, nx_local, channel]` in the field's units, NaN outside its mask.
    """

    field: Field
    starts: tuple[int, ...]
    forecast: torch.Tensor
    truth: torch.Tensor

    @property
    def leads(self) -> int:
        """Longest lead."""
        return self.forecast.shape[1]


def write_forecast(path: Path, contents: Forecast, partition: GridPartition, mesh: Mesh) -> None:
    """Write all ranks' parts as one file. Collective on the world.

    The variables are `forecast` and `truth`, or `NAME_forecast` and `NAME_truth` for each of several variables. Their
    dimensions are start, lead, y, x, and level if levels are channels. The last three have the names and coordinates of
    the data. No rank holds more than its own part.

    Raises `ConfigurationError` on all ranks when the file cannot be written.
    """
    time, kinds = contents.field.time, {"forecast": contents.forecast, "truth": contents.truth}
    starts, leads = np.array(contents.starts), np.arange(1, contents.leads + 1)
    dates = {
        "start": Variable(("start",), *encoded(time.stamps[starts], time.units)),
        "lead": Variable(("lead",), leads, {"long_name": "steps ahead of the start"}),
        "valid_time": Variable(("start", "lead"), *encoded(time.stamps[np.add.outer(starts, leads)], time.units)),
    }
    title = {"title": f"Forecasts of {contents.field.name}"}
    _write(path, contents.field, dates, ("start", "lead"), kinds, _FORECASTS, title, partition, mesh)


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
    _write(path, field, dates, ("time",), states, ("time", *states), attributes, partition, mesh)


def _write(
    path: Path,
    field: Field,
    dates: Mapping[str, Variable],
    leading: Sequence[str],
    kinds: Mapping[str, torch.Tensor],
    taken: Collection[str],
    attributes: Mapping[str, Any],
    partition: GridPartition,
    mesh: Mesh,
) -> None:
    data = field.data
    coordinates = {**dates, **_places(field, taken)}
    coordinates = {name: one for name, one in coordinates.items() if np.asarray(one.values).dtype.kind in "bfiuSU"}
    beside = " ".join(name for name, variable in coordinates.items() if variable.dimensions != (name,))
    stored = {}
    for source in data.variables:
        for kind, values in kinds.items():
            name = f"{source.name}_{kind}" if len(data.variables) > 1 else kind
            own = {"long_name": f"{source.name}, {kind.replace('_', ' ')}", "coordinates": beside}
            part = values[..., source.channels]
            # A state of one time has no leading dimension.
            before = tuple(leading)[: values.dim() - len(partition.local_shape)]
            stored[name] = _stored(source, part, before, {**own, "units": source.units}, field, taken, partition)
    axes = [_free(axis.name, taken) for axis in (data.y, data.x, *_levels(field).values())]
    write_dataset(path, {**coordinates, **stored}, mesh, attributes, bare=axes)


def _levels(field: Field) -> dict[str, Any]:
    return {variable.level.name: variable.level for variable in field.data.variables if variable.level is not None}


def _stored(
    source: Source,
    part: torch.Tensor,
    leading: Sequence[str],
    attributes: Mapping[str, Any],
    field: Field,
    taken: Collection[str],
    partition: GridPartition,
) -> Variable:
    """Return the channels of one variable of the field, along its levels if it has levels."""
    level = () if source.level is None else (source.level.name,)
    names = tuple(_free(name, taken) for name in (field.data.y.name, field.data.x.name, *level))
    own = OtherChannels(partition, part.shape[-1] if level else None)
    return Variable((*leading, *names), part if level else part[..., 0], attributes, np.float32, own)


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
