"""The base of problems whose data are trajectories: samples to learn from and held out, their units and leads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import BaseModel

from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.protocol import Partition
from pnode_dist.problems.common.forecast_data import Samples, SplitData, TrajectoryData, joined, samples_of
from pnode_dist.problems.common.forecast_parts import Parts, Scaling, moments, split
from pnode_dist.problems.common.tables import ForecastTable
from pnode_dist.problems.common.trainable import TrainableProblem


class TrajectoryProblem(TrainableProblem):
    """Sampled trajectories of a distributed state, of which the last ones or the last times are held out.

    A subclass gives `build_partition` and `load_data`. `normalised`: samples are states with mean 0 and deviation 1.
    """

    ProblemConfig: ClassVar[type[Any]] = ForecastTable
    normalised: ClassVar[bool] = False

    def build_partition(self) -> Partition:
        """The distribution of a state over the state ranks. Collective on the state ranks."""
        raise NotImplementedError

    def load_data(self) -> Any:
        """The trajectories, see the class. Collective on the world."""
        raise NotImplementedError

    @classmethod
    def _problem_table(cls) -> type[Any]:
        """The class of the table `[problem]`, with the keys of every forecast."""
        table = cls.ProblemConfig
        if isinstance(table, type) and issubclass(table, BaseModel) and not issubclass(table, ForecastTable):
            return type(
                table.__name__, (table, ForecastTable), {"__module__": table.__module__, "__doc__": table.__doc__}
            )
        return table

    @cached_property
    def partition(self) -> Partition:
        """The distribution of a state over the state ranks."""
        found: Any = self.build_partition()
        if not hasattr(found, "owned_slices"):
            raise ConfigurationError(f"{self._of('build_partition')}: returned {type(found).__name__}, not a partition")
        given: Partition = found
        return given

    @cached_property
    def data(self) -> TrajectoryData | SplitData:
        """The trajectories as `load_data` gave them."""
        found: Any = self.load_data()
        if isinstance(found, Iterator):
            return joined(found, self._of("load_data"))
        return found if isinstance(found, TrajectoryData | SplitData) else self.from_other(found)

    def from_other(self, data: Any) -> TrajectoryData:
        """The trajectories in what `load_data` returned, where that is an array or an xarray object."""
        module = type(data).__module__
        if module.partition(".")[0] == "xarray" or module.endswith("common.gridded"):
            from pnode_dist.problems.common.xarray_data import trajectory_of

            given: TrajectoryData = trajectory_of(data, self.partition, self._of("load_data"))
            return given
        if hasattr(data, "__array__"):
            return TrajectoryData(data)
        raise ConfigurationError(
            f"{self._of('load_data')}: returned {type(data).__name__}: must be a TrajectoryData, a SplitData, an "
            "array, an xarray object, or a generator of TrajectoryData"
        )

    @property
    def description(self) -> TrajectoryData:
        """The data's names, units and coordinates."""
        return self.data.training if isinstance(self.data, SplitData) else self.data

    @property
    def units(self) -> str:  # type: ignore[override]
        """The units of the errors; none where entries have different units, whose errors are in standard deviations."""
        units = self.description.units
        return units if isinstance(units, str) else (units[0] if len(set(units)) == 1 else "")

    def validation_partition(self) -> Partition:
        """The distribution of the trajectories that are held out, where `load_data` splits them. Default: the same."""
        return self.partition

    @property
    def missing(self) -> str:
        """`[problem] missing`, where the table has that key."""
        return getattr(self.settings, "missing", "refuse")

    @cached_property
    def _parts(self) -> Parts:
        source = self._of("load_data")

        def found(data: TrajectoryData, partition: Partition) -> Samples:
            return samples_of(data, partition, self.mesh, source, self.missing)

        if isinstance(self.data, SplitData):
            training = found(self.data.training, self.partition)
            parts = Parts(training, found(self.data.validation, self.validation_partition()), in_time=False)
        else:
            parts = split(found(self.data, self.partition), self.settings.validation, self.settings.window)
        return parts.scaled(self.build_scaling(parts.training))

    def build_scaling(self, learnt: Samples) -> Scaling | None:
        """The units of the states that are solved for; None: those of the data. Collective on the world.

        `learnt` are the training samples in the data's units. Default: mean and standard deviation if `normalised`.
        """
        return Scaling(*moments(learnt, self.mesh)) if self.normalised else None

    @property
    def samples(self) -> Samples:
        """This rank's part of the training samples, in the units that are solved for."""
        return self._parts.training

    @property
    def held_out(self) -> Samples:
        """This rank's part of the samples for validation, in the units that are solved for."""
        return self._parts.held_out

    @property
    def is_split_in_time(self) -> bool:
        """True if the validation samples are the last times of the only trajectory."""
        return self._parts.in_time

    def physical(self, states: torch.Tensor) -> torch.Tensor:
        """States in the data's units, in float64."""
        scaling = self._parts.scaling
        return states.double() if scaling is None else scaling.physical(states)

    @cached_property
    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel over `samples`, float64."""
        return moments(self.samples, self.mesh)

    @cached_property
    def leads(self) -> tuple[int, ...]:
        """The evaluated leads in samples: those of `[evaluation] leads`, of its default those that fit."""
        most, reason = self._longest_lead
        evaluation: Any = self.config.evaluation
        leads: tuple[int, ...] = evaluation.leads
        if max(leads) > most and "leads" not in evaluation.model_fields_set:
            return tuple(lead for lead in leads if lead <= most) or (most,)
        if max(leads) > most:
            raise ConfigurationError(f"[evaluation] leads = {list(leads)}: must be at most {most}, {reason}")
        return leads

    @property
    def _longest_lead(self) -> tuple[int, str]:
        """The longest lead that can be evaluated, and why."""
        return self.held_out.length - 1, "the samples that are held out after the first start"

    def _of(self, method: str) -> str:
        return f"{type(self).__name__}.{method}"
