"""The forecast as one NetCDF-4 file, written part by part by the ranks that own the parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
import numpy.typing as npt
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.field.data import Field, TimeAxis
from pnode_dist.report.turns import in_turn, write_failure

_SECONDS = "seconds since 1970-01-01 00:00:00"


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


def write_forecast(path: Path, contents: Forecast, partition: GridPartition, mesh: Mesh) -> None:
    """Write all ranks' parts as one file. Collective on the world.

    The variables `forecast` and `truth` have the dimensions start, lead, y, x and for fields with channels channel,
    the last three named as in the field's own file and with its coordinates. Rank 0 creates the file, then the ranks
    of the first replica write in turn: no rank holds more than its own part, and HDF5 need not be parallel.
    Raises `ConfigurationError` on all ranks when the file cannot be written.
    """
    in_turn(lambda: _create(path, contents, partition), lambda: _write_part(path, contents, partition), partition, mesh)


def _create(path: Path, contents: Forecast, partition: GridPartition) -> None:
    """Lay out the file: dimensions, coordinates, and the variables without their values."""
    field = contents.field
    axes = field.axes
    sizes = (len(contents.starts), contents.leads, *partition.shape, field.channels)[: 2 + len(axes)]
    names = ("start", "lead", *(axis.name for axis in axes))
    try:
        with h5netcdf.File(path, "w") as file:
            file.attrs["Conventions"] = "CF-1.8"
            file.attrs["title"] = f"Forecasts of {field.name}"
            file.dimensions = dict(zip(names, sizes, strict=True))
            leads = np.arange(1, contents.leads + 1)
            valid = np.add.outer(np.array(contents.starts), leads)
            _coordinate(file, "start", ("start",), *_encoded(field.time, np.array(contents.starts)))
            _coordinate(file, "lead", ("lead",), leads, {"long_name": "steps ahead of the start"})
            _coordinate(file, "valid_time", ("start", "lead"), *_encoded(field.time, valid))
            for axis in axes:
                values = axis.values.astype(np.int64) if axis.values.dtype.kind == "b" else axis.values
                if values.dtype.kind in "fiu":
                    _coordinate(file, axis.name, (axis.name,), values, axis.attributes)
            for variable in ("forecast", "truth"):
                stored = file.create_variable(variable, names, np.float32, fillvalue=np.float32(np.nan))
                stored.attrs["long_name"] = f"{field.name}, {variable}"
                stored.attrs["coordinates"] = "valid_time"
                if field.units:
                    stored.attrs["units"] = field.units
    except OSError as error:
        raise write_failure(path, error) from None


def _coordinate(
    file: h5netcdf.File, name: str, dimensions: tuple[str, ...], values: npt.NDArray[Any], attributes: dict[str, Any]
) -> None:
    stored = file.create_variable(name, dimensions, values.dtype, data=values)
    stored.attrs.update({key: value for key, value in attributes.items() if value != ""})


def _encoded(time: TimeAxis, index: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """Times by the CF conventions: dates as seconds since 1970, numbers as they are."""
    stamps = time.stamps[index]
    if stamps.dtype.kind == "M":
        seconds = stamps.astype("datetime64[s]").astype(np.int64)
        return seconds, {"units": _SECONDS, "calendar": "proleptic_gregorian"}
    return stamps, {"units": time.units}


def _write_part(path: Path, contents: Forecast, partition: GridPartition) -> None:
    """Write what this rank owns into the file that is there."""
    (y0, y1), (x0, x1) = partition.owned
    try:
        with h5netcdf.File(path, "r+") as file:
            for name, values in (("forecast", contents.forecast), ("truth", contents.truth)):
                part = values if len(contents.field.axes) == 3 else values[..., 0]
                file.variables[name][:, :, y0:y1, x0:x1] = part.numpy().astype(np.float32)
    except OSError as error:
        raise write_failure(path, error) from None
