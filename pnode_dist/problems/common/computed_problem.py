"""The base of forecasts whose trajectories are computed from known equations, and of those of ensembles."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pnode_dist.partition.batch import BatchPartition
from pnode_dist.problems.common.forecast_data import SplitData, Start, TrajectoryData, Windows
from pnode_dist.problems.common.forecast_file import TRUTH, ForecastFile, coordinates
from pnode_dist.problems.common.forecast_problem import ForecastProblem
from pnode_dist.report.dataset_file import Later, OtherChannels, Variable
from pnode_dist.report.dataset_stream import DatasetStream


class ComputedProblem(ForecastProblem):
    """A forecast of trajectories that are computed, some to learn from and others to follow from their first samples.

    `[problem]` is a `ComputedTable`. Leads, replicas and budget are checked before anything is computed. The file has
    the dimensions trajectory, time and those of the data; a channel that they do not name is left out.
    """

    model_variable: ClassVar[str] = "forecast"
    """The name of the model's forecasts in the file."""
    stores_baselines: ClassVar[bool] = True
    """The file also holds the forecasts that the model is compared with."""
    file_dtype: ClassVar[type[np.floating[Any]]] = np.float32

    def sample_times(self) -> Sequence[float]:
        """The times of the samples, by default `[problem] interval` apart."""
        return [number * self.settings.interval for number in range(self.settings.times)]

    def clock(self, leads: int) -> Sequence[float]:
        """The times since their start at which windows of so many leads are solved for."""
        times = self.sample_times()
        return [time - times[0] for time in times[: leads + 1]]

    def split_data(self, training: Any, validation: Any, **described: Any) -> SplitData:
        """Values `[trajectory, time, *shape]` as trajectories to learn from and to follow, with their description."""
        times = np.array(self.sample_times())
        return SplitData(*(TrajectoryData(values, times, **described) for values in (training, validation)))

    def _check_data(self) -> None:
        self._check_sizes(self.training_windows(), self.clock(self.settings.window))

    def training_windows(self) -> int:
        """The number of training windows."""
        windows: int = self.settings.trajectories * (self.settings.times - self.settings.window)
        return windows

    @property
    def _longest_lead(self) -> tuple[int, str]:
        return (
            self.settings.times - 1,
            "one less than [problem] times, so that they lie in the validation trajectories",
        )

    @property
    def _solves_one_by_one(self) -> bool:
        return False

    def layout(self, batch: Windows) -> Variable:
        """A variable of the file for forecasts of a batch, with the states that they start from; written later."""
        names, partition = tuple(self.description.dimensions), batch.samples.partition
        local = tuple(partition.local_shape)
        leading: tuple[int, ...] = (len(batch.starts), 1 + batch.steps)
        if len(names) < len(partition.global_shape):
            partition, local = OtherChannels(partition), local[:-1]
        axes: tuple[str, ...] = ("trajectory", "time")
        if "trajectory" in names:
            axes, leading = axes[1:], leading[1:]
        return Variable((*axes, *names), Later((*leading, *local)), {}, self.file_dtype, partition)

    def create_file(
        self, path: Path, batch: Windows, forecasts: Collection[str], others: Mapping[str, Variable]
    ) -> ForecastFile:
        """Create `forecast.h5`, with `others`. Collective on the world."""
        data = self.description
        axis = data.dimensions[-1]
        named = {axis: Variable((axis,), np.array(list(data.names)))} if data.names else {}
        kept = forecasts if self.stores_baselines else ("model",)
        names = {TRUTH: TRUTH, **{name: self.model_variable if name == "model" else name for name in kept}}
        own = {"time": Variable(("time",), np.asarray(data.times)), **dict.fromkeys(names.values(), self.layout(batch))}
        stream = DatasetStream(path, {**named, **coordinates(data), **own, **others}, self.mesh)
        single = "trajectory" in data.dimensions
        scalar = len(data.dimensions) < len(batch.samples.partition.global_shape)
        return ForecastFile(stream, batch, names, self.physical, single, scalar)


class EnsembleProblem(ComputedProblem):
    """Trajectories of a small system from many initial states, whole ones on each rank, all solved together.

    A state holds all trajectories: `[trajectory, component]`. A window is a stretch of all of them.
    """

    components: ClassVar[tuple[str, ...]] = ()
    """The names of the components of one trajectory's state."""
    file_dtype: ClassVar[type[np.floating[Any]]] = np.float64

    def build_partition(self) -> BatchPartition:
        """The training trajectories, consecutive ones on each rank."""
        return BatchPartition(self.mesh, self.settings.trajectories, (len(self.components),))

    def validation_partition(self) -> BatchPartition:
        """The validation trajectories, consecutive ones on each rank."""
        return BatchPartition(self.mesh, self.settings.validation, (len(self.components),))

    def split_data(self, training: Any, validation: Any, **described: Any) -> SplitData:
        """Values `[time, trajectory, component]`, whole on every rank, with their description."""
        dimensions = ("trajectory", "component")
        return super().split_data(training, validation, names=self.components, dimensions=dimensions, **described)

    def training_windows(self) -> int:
        """The number of training windows."""
        windows: int = self.settings.times - self.settings.window
        return windows

    def held_out_part(self, whole: Any) -> torch.Tensor:
        """This rank's part `[lead, 1, trajectory_local, component]` of whole trajectories like the validation's."""
        partition = self.held_out.partition
        part: torch.Tensor = torch.as_tensor(whole)[1:, None][(..., *partition.owned_slices(partition.comm.rank))]
        return part

    def variables(self, batch: Windows) -> Mapping[str, Variable]:
        """The units of the errors, as a variable of the file."""
        scaling = self._parts.scaling
        return {"scale": Variable(("component",), self.moments[1] if scaling is None else scaling.scale)}

    def gradcheck_starts(self) -> list[Start]:
        """The first and the last window."""
        starts = self.samples.starts(self.settings.window)
        return [starts[0], starts[-1]]
