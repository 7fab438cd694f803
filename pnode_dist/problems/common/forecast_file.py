"""The forecasts of what is held out, and what came true, as one self-describing file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.protocol import Partition
from pnode_dist.problems.common.forecast_data import TrajectoryData, Windows
from pnode_dist.problems.common.trainable import FORECAST
from pnode_dist.report.dataset_file import Variable, write_dataset

_OWN = ("start", "lead", "forecast", "truth", "trajectory", "start_time", "time", "lead_time", "start_label")


def write_forecast(
    path: Path,
    forecast: torch.Tensor,
    batch: Windows,
    data: TrajectoryData,
    units: str,
    mesh: Mesh,
    others: Mapping[str, Variable],
) -> None:
    """Write forecasts `[lead, start, *local_shape]`, what they were to be, and `others`. Collective on the world.

    The variables `forecast` and `truth`, float32, have the dimensions start, lead and those of the state; the first
    lead, 0, is the state that was started from. `time(start, lead)` are the data's times, and `lead_time(lead)` those
    since the start of the first forecast, in the units of the solve. Missing values are NaN.
    Raises `ConfigurationError` on all ranks when the file cannot be written.
    """
    samples, partition = batch.samples, batch.samples.partition
    names = dimensions(data, partition)
    truth = torch.cat([batch.initial[None].double(), batch.targets.double()])
    forecast = torch.cat([batch.initial[None].double(), forecast])
    if batch.weights is not None:
        truth[1:] = truth[1:].masked_fill(batch.weights == 0, math.nan)
    numbers = np.array([first for _, first in batch.starts]) + samples.first
    own = {"units": units}
    variables = {
        "start": Variable(("start",), np.arange(len(batch.starts)), {"long_name": "number of the forecast"}),
        "lead": Variable(("lead",), np.arange(len(truth)), {"long_name": "samples ahead of the start"}),
        "trajectory": Variable(("start",), np.array([number for number, _ in batch.starts])),
        "time": _times(data, batch, numbers),
        "lead_time": Variable(("lead",), np.array(batch.times[0]) - batch.times[0][0]),
        "forecast": Variable(("start", "lead", *names), forecast.transpose(0, 1), own, np.float32, partition),
        "truth": Variable(("start", "lead", *names), truth.transpose(0, 1), own, np.float32, partition),
    }
    if len(data.labels) > numbers.max(initial=0):
        variables["start_label"] = Variable(("start",), np.array([data.labels[number] for number in numbers]))
    if len(data.names):
        variables[names[-1]] = Variable((names[-1],), np.array(list(data.names)))
    write_dataset(path, {**coordinates(data), **variables, **others}, mesh, {"title": "Forecasts"})


def coordinates(data: TrajectoryData) -> dict[str, Variable]:
    """The coordinates of the data's dimensions, as variables of a file."""
    return {
        name: values if isinstance(values, Variable) else Variable((name,), np.asarray(values))
        for name, values in data.coordinates.items()
    }


def _times(data: TrajectoryData, batch: Windows, numbers: npt.NDArray[np.int64]) -> Variable:
    """The times of each forecast, dates by the CF conventions where the data have some."""
    if data.file_times is None:
        return Variable(("start", "lead"), np.array(batch.times))
    times, attributes = data.file_times
    leads = np.arange(len(batch.times[0]))
    return Variable(("start", "lead"), np.asarray(times)[np.add.outer(numbers, leads)], attributes)


def dimensions(data: TrajectoryData, partition: Partition) -> tuple[str, ...]:
    """The names of a state's axes: those of the data, or the partition's own."""
    if data.dimensions:
        if len(data.dimensions) != len(partition.global_shape):
            raise ConfigurationError(
                f"dimensions = {list(data.dimensions)}: must be {len(partition.global_shape)} names, one for each axis "
                "of a state"
            )
        taken = [name for name in data.dimensions if name in _OWN]
        if taken:
            raise ConfigurationError(f"dimensions: {taken[0]} is the name of another variable of {FORECAST}")
        return tuple(data.dimensions)
    if isinstance(partition, GridPartition):
        return (*partition.axes, "channel")
    axes = len(partition.global_shape)
    return ("entry",) if axes == 1 else ("point", *(f"axis_{number}" for number in range(1, axes - 1)), "channel")
