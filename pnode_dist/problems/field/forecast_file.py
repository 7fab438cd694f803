"""Forecasts of a field as one NetCDF-4 file, with the dates and the coordinates of the field's own files."""

from __future__ import annotations

from collections.abc import Mapping
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
    data = contents.field.data
    coordinates = _coordinates(contents)
    beside = " ".join(name for name, variable in coordinates.items() if variable.dimensions != (name,))
    stored = {}
    for source in data.variables:
        for kind, values in (("forecast", contents.forecast), ("truth", contents.truth)):
            name = f"{source.name}_{kind}" if len(data.variables) > 1 else kind
            attributes = {"long_name": f"{source.name}, {kind}", "coordinates": beside, "units": source.units}
            stored[name] = _stored(source, values, attributes, contents.field, partition)
    axes = [_free(axis.name) for axis in (data.y, data.x, *_levels(contents.field).values())]
    write_dataset(path, {**coordinates, **stored}, mesh, {"title": f"Forecasts of {contents.field.name}"}, bare=axes)


def _levels(field: Field) -> dict[str, Any]:
    return {variable.level.name: variable.level for variable in field.data.variables if variable.level is not None}


def _stored(
    source: Source, values: torch.Tensor, attributes: Mapping[str, Any], field: Field, partition: GridPartition
) -> Variable:
    """Return the channels of one variable of the field, along its levels if it has levels."""
    part = values[..., source.channels]
    level = () if source.level is None else (source.level.name,)
    names = tuple(_free(name) for name in (field.data.y.name, field.data.x.name, *level))
    own = OtherChannels(partition, part.shape[-1] if level else None)
    return Variable(("start", "lead", *names), part if level else part[..., 0], attributes, np.float32, own)


def _free(name: str) -> str:
    """Return a name of the data, prefixed if it clashes with a name of the file itself."""
    return f"field_{name}" if name in ("start", "lead", "valid_time", "forecast", "truth") else name


def _coordinates(contents: Forecast) -> dict[str, Variable]:
    """Return the dates of starts and forecasts, the leads, and all coordinates of the field that a file can hold."""
    time, data = contents.field.time, contents.field.data
    starts, leads = np.array(contents.starts), np.arange(1, contents.leads + 1)
    found = {
        "start": Variable(("start",), *encoded(time.stamps[starts], time.units)),
        "lead": Variable(("lead",), leads, {"long_name": "steps ahead of the start"}),
        "valid_time": Variable(("start", "lead"), *encoded(time.stamps[np.add.outer(starts, leads)], time.units)),
    }
    for axis in (data.y, data.x, *_levels(contents.field).values()):
        if axis.given:
            found[_free(axis.shown)] = Variable((_free(axis.name),), axis.values, axis.attributes)
    for coordinate in data.coordinates:
        dimensions = tuple(map(_free, coordinate.dimensions))
        found[_free(coordinate.name)] = Variable(dimensions, coordinate.load(), coordinate.attributes)
    return {name: variable for name, variable in found.items() if np.asarray(variable.values).dtype.kind in "bfiuSU"}
