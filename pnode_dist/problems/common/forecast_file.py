"""The forecasts of what is held out, and what came true, as one self-describing file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.protocol import Partition
from pnode_dist.problems.common.forecast_data import TrajectoryData, Windows
from pnode_dist.problems.common.forecast_stream import Row
from pnode_dist.problems.common.trainable import FORECAST
from pnode_dist.report.dataset_file import Later, Variable
from pnode_dist.report.dataset_stream import DatasetStream

TRUTH = "truth"
"""The name of what the forecasts were to be, among the forecasts that a file stores."""
_OWN = ("start", "lead", "forecast", "truth", "trajectory", "start_time", "time", "lead_time", "start_label")


class ForecastFile:
    """The file of an evaluation, which is written one lead after the other.

    `names` are the variables of the stored forecasts by the name of the forecast, `truth` among them. `physical` makes
    values of the file of states. With `single` there is no axis of starts, as there is one start, and with `scalar` the
    only channel has no axis. Missing values of the truth are NaN. It is a context manager like `DatasetStream`.
    """

    def __init__(
        self,
        stream: DatasetStream,
        batch: Windows,
        names: Mapping[str, str],
        physical: Callable[[torch.Tensor], torch.Tensor],
        single: bool = False,
        scalar: bool = False,
    ) -> None:
        self.stream, self._batch, self._names, self._physical = stream, batch, names, physical
        self._single, self._scalar = single, scalar
        every = range(len(batch.starts))
        for variable in names.values():
            self._put(variable, Row(0, every, batch.initial.double()))

    def __enter__(self) -> Self:
        self.stream.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.__exit__(kind, error, trace)

    def write(self, name: str, row: Row) -> None:
        """Write a part of the forecast `name`, if it is one of those that are stored. Collective on the state ranks."""
        if name in self._names:
            self._put(self._names[name], row)

    def _put(self, variable: str, row: Row) -> None:
        values = self._physical(row.states)
        missing = self._batch.weight(row.lead) if variable == TRUTH and row.lead else None
        if missing is not None:
            values = values.masked_fill(missing[list(row.starts)] == 0, math.nan)
        if self._scalar:
            values = values[..., 0]
        if self._single:
            self.stream.write(variable, (row.lead,), values[0])
            return
        first, last = min(row.starts), max(row.starts)
        if list(row.starts) == list(range(first, last + 1)):
            self.stream.write(variable, (slice(first, last + 1), row.lead), values)
            return
        for start, state in zip(row.starts, values, strict=True):
            self.stream.write(variable, (start, row.lead), state)


def create_forecast(
    path: Path,
    batch: Windows,
    data: TrajectoryData,
    units: str,
    physical: Callable[[torch.Tensor], torch.Tensor],
    mesh: Mesh,
    others: Mapping[str, Variable],
) -> ForecastFile:
    """Create the file of the forecasts of a batch, with what they were to be, and `others`. Collective on the world.

    The variables `forecast` and `truth`, float32, have the dimensions start, lead and those of the state; the first
    lead, 0, is the state that was started from. `time(start, lead)` are the data's times, and `lead_time(lead)` those
    since the start of the first forecast, in the units of the solve. Missing values are NaN.
    Raises `ConfigurationError` on all ranks when the file cannot be written.
    """
    samples, partition = batch.samples, batch.samples.partition
    names = dimensions(data, partition)
    numbers = np.array([first for _, first in batch.starts]) + samples.first
    shape = Later((len(batch.starts), 1 + batch.steps, *partition.local_shape))
    values = Variable(("start", "lead", *names), shape, {"units": units}, np.float32, partition)
    variables = {
        "start": Variable(("start",), np.arange(len(batch.starts)), {"long_name": "number of the forecast"}),
        "lead": Variable(("lead",), np.arange(1 + batch.steps), {"long_name": "samples ahead of the start"}),
        "trajectory": Variable(("start",), np.array([number for number, _ in batch.starts])),
        "time": _times(data, batch, numbers),
        "lead_time": Variable(("lead",), np.array(batch.times[0]) - batch.times[0][0]),
        "forecast": values,
        "truth": values,
    }
    if len(data.labels) > numbers.max(initial=0):
        variables["start_label"] = Variable(("start",), np.array([data.labels[number] for number in numbers]))
    if len(data.names):
        variables[names[-1]] = Variable((names[-1],), np.array(list(data.names)))
    stream = DatasetStream(path, {**coordinates(data), **variables, **others}, mesh, {"title": "Forecasts"})
    return ForecastFile(stream, batch, {"model": "forecast", TRUTH: "truth"}, physical)


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
