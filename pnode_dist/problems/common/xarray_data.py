"""Trajectories from xarray objects and gridded files, of which each rank reads its own part alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray

from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.protocol import Partition
from pnode_dist.problems.common.calendar import calendar_of, encoded, numbers_of, time_label
from pnode_dist.problems.common.forecast_data import TrajectoryData
from pnode_dist.problems.common.gridded import Axis, GriddedData
from pnode_dist.problems.common.gridded_files import GriddedChoice, open_gridded
from pnode_dist.report.dataset_file import Variable


def trajectory_of(data: Any, partition: Partition, source: str) -> TrajectoryData:
    """This rank's part of one trajectory, from a Dataset, a DataArray, or what `open_gridded` returned.

    Axes are found by the CF conventions, in any order. All variables of a Dataset on time, y and x become channels.
    Dates are counted in years, numbers stay as they are. `source` names the data in errors.
    Raises `ConfigurationError` for axes that cannot be told apart, and data that do not fit the partition.
    """
    gridded = data if isinstance(data, GriddedData) else _gridded(data, source)
    shape = (*gridded.shape, gridded.channels)
    if not isinstance(partition, GridPartition) or partition.global_shape != shape:
        raise ConfigurationError(
            f"{source}: the data have {shape[0]} x {shape[1]} points and {shape[2]} channel(s): the partition must be "
            f"a GridPartition of that shape, and is a {type(partition).__name__} of {partition.global_shape}"
        )
    rows, columns = partition.owned
    times = len(gridded.stamps)
    dated = calendar_of(gridded.stamps) is not None
    return TrajectoryData(
        gridded.read((0, times), rows, columns),
        numbers_of(gridded.stamps),
        local=True,
        names=gridded.labels,
        units=gridded.units,
        dimensions=(gridded.y.name, gridded.x.name, "channel"),
        coordinates=_coordinates(gridded),
        labels=[time_label(stamp, "days" if dated else "") for stamp in gridded.stamps],
        file_times=encoded(gridded.stamps, gridded.time_units),
    )


def _gridded(data: Any, source: str) -> GriddedData:
    """The variables that all have the same dimensions, with their axes."""
    if isinstance(data, xarray.DataArray):
        data = data.to_dataset(name=data.name or "values")
    names = [str(name) for name, variable in data.data_vars.items() if variable.ndim >= 2]
    if not names:
        raise ConfigurationError(f"{source}: the data set has no variable of two or more dimensions")
    try:
        return open_gridded(data, GriddedChoice(tuple(names)))
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}: {str(error).replace('[problem] ', '')}") from None


def _coordinates(gridded: GriddedData) -> dict[str, Variable]:
    """The coordinates of the grid, for the forecast's file."""
    found = {axis.name: _of_axis(axis) for axis in (gridded.y, gridded.x)}
    for coordinate in gridded.coordinates:
        values = np.asarray(coordinate.load())
        if values.dtype.kind in "fiu" and coordinate.name not in found:
            found[coordinate.name] = Variable(coordinate.dimensions, values, _plain(coordinate.attributes))
    return found


def _of_axis(axis: Axis) -> Variable:
    values = axis.values.astype(np.int64) if axis.values.dtype.kind == "b" else axis.values
    return Variable((axis.name,), values, _plain(axis.attributes))


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes that a file can hold."""
    return {key: value for key, value in attributes.items() if isinstance(value, str | int | float)}
