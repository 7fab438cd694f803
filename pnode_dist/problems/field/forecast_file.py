"""The forecast as one NetCDF-4 file, written part by part by the ranks that own the parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import numpy.typing as npt
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.calendar import encoded
from pnode_dist.problems.common.gridded import GriddedData, Variable
from pnode_dist.problems.field.data import Field
from pnode_dist.report.turns import in_turn, write_failure


@dataclass(frozen=True)
class Forecast:
    """This rank's part of the forecasts from the times number `starts`, and of what came true.

    `forecast` and `truth` are `[start, lead, ny_local, nx_local, channel]` in the field's units, NaN outside its mask.
    """

    field: Field
    starts: tuple[int, ...]
    forecast: torch.Tensor
    truth: torch.Tensor

    @property
    def leads(self) -> int:
        """The longest lead."""
        return self.forecast.shape[1]


@dataclass(frozen=True)
class _Stored:
    """A variable of the file: whose values it has, which of the forecast's channels, and its dimensions."""

    name: str
    source: Variable
    is_truth: bool
    dimensions: tuple[str, ...]


def write_forecast(path: Path, contents: Forecast, partition: GridPartition, mesh: Mesh) -> None:
    """Write all ranks' parts as one file. Collective on the world.

    The variables `forecast` and `truth`, or of several variables `NAME_forecast` and `NAME_truth` of each, have the
    dimensions start, lead, y, x and where levels were channels level, the last three named as in the data and with
    their coordinates. Rank 0 creates the file, then the ranks of the first replica write in turn: no rank holds more
    than its own part, and HDF5 need not be parallel.
    Raises `ConfigurationError` on all ranks when the file cannot be written.
    """
    in_turn(lambda: _create(path, contents, partition), lambda: _write_part(path, contents, partition), partition, mesh)


def _stored(data: GriddedData) -> list[_Stored]:
    several = len(data.variables) > 1
    stored = []
    for variable in data.variables:
        level = () if variable.level is None else (variable.level.name,)
        dimensions = tuple(_free(name) for name in (data.y.name, data.x.name, *level))
        for kind in ("forecast", "truth"):
            name = f"{variable.name}_{kind}" if several else kind
            stored.append(_Stored(name, variable, kind == "truth", ("start", "lead", *dimensions)))
    return stored


def _free(name: str) -> str:
    """A name of the data that none of the file's own names is."""
    return f"field_{name}" if name in ("start", "lead", "valid_time", "forecast", "truth") else name


def _create(path: Path, contents: Forecast, partition: GridPartition) -> None:
    """Lay out the file: dimensions, coordinates, and the variables without their values."""
    field, data = contents.field, contents.field.data
    levels = {variable.level.name: variable.level for variable in data.variables if variable.level is not None}
    sizes = dict(zip((_free(data.y.name), _free(data.x.name)), partition.shape, strict=True))
    sizes |= {_free(name): len(level.values) for name, level in levels.items()}
    try:
        with h5netcdf.File(path, "w") as file:
            file.attrs["Conventions"] = "CF-1.8"
            file.attrs["title"] = f"Forecasts of {field.name}"
            file.dimensions = {"start": len(contents.starts), "lead": contents.leads} | sizes
            leads = np.arange(1, contents.leads + 1)
            valid = np.add.outer(np.array(contents.starts), leads)
            stamps, units = field.time.stamps, field.time.units
            _coordinate(file, "start", ("start",), *encoded(stamps[np.array(contents.starts)], units))
            _coordinate(file, "lead", ("lead",), leads, {"long_name": "steps ahead of the start"})
            _coordinate(file, "valid_time", ("start", "lead"), *encoded(stamps[valid], units))
            beside = ["valid_time"]
            for axis in (data.y, data.x, *levels.values()):
                if axis.given:
                    _coordinate(file, _free(axis.shown), (_free(axis.name),), axis.values, axis.attributes)
                    beside += [_free(axis.shown)] if axis.shown != axis.name else []
            for coordinate in data.coordinates:
                dimensions = tuple(map(_free, coordinate.dimensions))
                _coordinate(file, _free(coordinate.name), dimensions, coordinate.load(), coordinate.attributes)
                beside.append(_free(coordinate.name))
            for variable in _stored(data):
                stored = file.create_variable(
                    variable.name, variable.dimensions, np.float32, fillvalue=np.float32(np.nan)
                )
                stored.attrs["long_name"] = f"{variable.source.name}, {'truth' if variable.is_truth else 'forecast'}"
                stored.attrs["coordinates"] = " ".join(beside)
                if variable.source.units:
                    stored.attrs["units"] = variable.source.units
    except OSError as error:
        raise write_failure(path, error) from None


def _coordinate(
    file: h5netcdf.File, name: str, dimensions: tuple[str, ...], values: npt.NDArray[Any], attributes: dict[str, Any]
) -> None:
    if values.dtype.kind == "b":
        values = values.astype(np.int8)
    elif values.dtype.kind in "US":
        stored = file.create_variable(name, dimensions, h5py.string_dtype())
        stored[...] = values.astype(str).astype(object)
        return
    elif values.dtype.kind not in "fiu":
        return
    native = values.astype(values.dtype.newbyteorder("="))
    stored = file.create_variable(name, dimensions, native.dtype, data=native)
    stored.attrs.update({key: value for key, value in attributes.items() if value != ""})


def _write_part(path: Path, contents: Forecast, partition: GridPartition) -> None:
    """Write what this rank owns into the file that is there."""
    (y0, y1), (x0, x1) = partition.owned
    try:
        with h5netcdf.File(path, "r+") as file:
            for variable in _stored(contents.field.data):
                values = contents.truth if variable.is_truth else contents.forecast
                part = values[..., variable.source.channels]
                part = part if variable.source.level is not None else part[..., 0]
                file.variables[variable.name][:, :, y0:y1, x0:x1] = part.numpy().astype(np.float32)
    except OSError as error:
        raise write_failure(path, error) from None
