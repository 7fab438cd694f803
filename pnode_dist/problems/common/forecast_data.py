"""Trajectories for a forecast: as a problem gives them, and this rank's part of them, checked and split.

The last trajectories, or of a single one the last times, are held out for validation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.protocol import Partition

Start = tuple[int, int]
"""A trajectory, and the number of one of its samples."""
_EQUAL_INTERVALS = 1e-9


@dataclass(frozen=True)
class TrajectoryData:
    """Sampled trajectories, as `ForecastProblem.load_data` returns them.

    `values` is an array or tensor `[time, *shape]`, or `[trajectory, time, *shape]`, where `shape` is the partition's
    `global_shape`; with `local` its `local_shape`, for a rank that loads its own part alone. NaN marks a missing value.
    `times` is `[time]`, increasing, or the interval between samples. `names` are those of the entries along the last
    axis, `units` theirs (one for all, or one each), `dimensions` those of the state's axes, and `coordinates` their
    values by name. `labels` `[time]` are dates or other names of the times, and
    `file_times` the times `[time]` as the forecast's file is to have them, with their attributes.
    """

    values: Any
    times: Any = 1.0
    local: bool = False
    names: Sequence[str] = ()
    units: str | Sequence[str] = ""
    dimensions: Sequence[str] = ()
    coordinates: Mapping[str, Any] = field(default_factory=dict)
    labels: Sequence[str] = ()
    file_times: tuple[Any, Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class SplitData:
    """Trajectories to learn from and trajectories held out, where a problem splits them itself."""

    training: TrajectoryData
    validation: TrajectoryData


@dataclass(frozen=True)
class Samples:
    """This rank's part of trajectories that are sampled at the same times.

    `values` `[trajectory, time, *local_shape]`, float64, are zero where `present` is false; `present` None: all are
    there. `times` `[time]`, float64. `partition` is that of one state. `first` is the number of the first sample in
    the data.
    """

    partition: Partition
    values: torch.Tensor
    times: torch.Tensor
    present: torch.Tensor | None = None
    first: int = 0

    @property
    def count(self) -> int:
        """The number of trajectories."""
        return self.values.shape[0]

    @property
    def length(self) -> int:
        """Samples of a trajectory."""
        return self.values.shape[1]

    @property
    def is_regular(self) -> bool:
        """True if the times are at equal intervals, up to rounding."""
        steps = self.times.diff()
        return bool(len(steps) == 0 or (steps - steps[0]).abs().max() <= _EQUAL_INTERVALS * steps[0])

    def starts(self, window: int) -> list[Start]:
        """The starts of all windows of `window` samples ahead, without those at a time that is missing as a whole."""
        usable = self.usable_times()
        return [
            (number, first)
            for number in range(self.count)
            for first in range(self.length - window)
            if usable[number, first]
        ]

    def usable_times(self) -> torch.Tensor:
        """Return a mask `[trajectory, time]` of the states to start from: those that lack no value of other times.

        Collective on the partition's communicator.
        """
        if self.present is None:
            return torch.ones(self.count, self.length, dtype=torch.bool)
        ever = self.present.flatten(0, 1).any(dim=0)
        lacking = (ever & ~self.present).flatten(2).any(dim=2)
        return torch.from_numpy(self.partition.comm.allreduce(lacking.numpy().astype(np.int64)) == 0)

    def trajectories(self, begin: int, end: int) -> Samples:
        """The trajectories `begin` to `end`."""
        present = None if self.present is None else self.present[begin:end]
        return replace(self, values=self.values[begin:end], present=present)

    def part(self, begin: int, end: int) -> Samples:
        """The samples `begin` to `end` of each trajectory."""
        present = None if self.present is None else self.present[:, begin:end]
        return replace(
            self,
            values=self.values[:, begin:end],
            times=self.times[begin:end],
            present=present,
            first=self.first + begin,
        )


@dataclass(frozen=True)
class Windows:
    """Stretches of trajectories that are solved together, or in groups of equal times.

    `initial` `[window, *local_shape]` are the states at `starts`, and `steps` is the number of samples ahead. `times`
    are those of each window, its start first. States are of the dtype of `initial`.
    """

    samples: Samples
    starts: tuple[Start, ...]
    steps: int
    initial: torch.Tensor
    times: tuple[tuple[float, ...], ...]

    def target(self, lead: int) -> torch.Tensor:
        """The states `[window, *local_shape]` at `lead` samples after the starts, from 1 to `steps`."""
        return self._ahead(self.samples.values, lead)

    def weight(self, lead: int) -> torch.Tensor | None:
        """A mask shaped like `target(lead)`, 0 for what is missing; None: nothing is."""
        return None if self.samples.present is None else self._ahead(self.samples.present, lead)

    @cached_property
    def targets(self) -> torch.Tensor:
        """The states at all leads, `[lead, window, *local_shape]`, made at the first access."""
        return torch.stack([self.target(lead) for lead in self.leads])

    @cached_property
    def weights(self) -> torch.Tensor | None:
        """The masks at all leads, shaped like `targets`."""
        found = [mask for mask in map(self.weight, self.leads) if mask is not None]
        return torch.stack(found) if found else None

    @property
    def leads(self) -> range:
        """The leads of the targets: 1, 2, ..."""
        return range(1, self.steps + 1)

    def part(self, begin: int, end: int, dtype: torch.dtype) -> Windows:
        """The windows `begin` to `end`, in `dtype`."""
        return windows(self.samples, self.starts[begin:end], self.steps, dtype)

    def _ahead(self, values: torch.Tensor, lead: int) -> torch.Tensor:
        trajectory, first = _indices(self.starts)
        return values[trajectory, first + lead].to(self.initial.dtype)


def windows(samples: Samples, starts: Sequence[Start], steps: int, dtype: torch.dtype) -> Windows:
    """The windows of `steps` samples that begin at `starts`, in `dtype`."""
    times = tuple(tuple(samples.times[start : start + steps + 1].tolist()) for _, start in starts)
    return Windows(samples, tuple(starts), steps, samples.values[_indices(starts)].to(dtype), times)


def _indices(starts: Sequence[Start]) -> tuple[torch.Tensor, torch.Tensor]:
    trajectory, first = torch.tensor(tuple(starts), dtype=torch.int64).reshape(-1, 2).unbind(1)
    return trajectory, first


def samples_of(data: TrajectoryData, partition: Partition, mesh: Mesh, source: str, missing: str) -> Samples:
    """This rank's part of the trajectories, checked. Collective on the world.

    `source` names the data in errors. `missing`, `refuse` or `mask`, is the action on a value that is not a number.
    Raises `ConfigurationError` on all ranks for shapes that do not fit the partition, times that do not increase,
    values that are not finite, and ranks that were given data of different lengths.
    """
    values = agreed(mesh, lambda: _array(data.values, source))
    shape = tuple(partition.local_shape if data.local else partition.global_shape)
    leading = values.ndim - len(shape)
    wrong = ""
    if leading not in (1, 2) or values.shape[leading:] != shape:
        wrong = (
            f"{source}: values has shape {values.shape}: must be [time, *state] or [trajectory, time, *state] with a "
            f"state of {shape}{', this rank has its part alone' if data.local else ''}"
        )
    elif 0 in values.shape[:leading]:
        wrong = f"{source}: values has shape {values.shape}: there is no time in it"
    _raise_on_all(wrong, mesh)
    if leading == 1:
        values = values[None]
    times, wrong = _times(data.times, values.shape[1], source)
    _raise_on_all(wrong, mesh)
    _check_alike((values.shape[:2], times.tobytes()), values.shape[:2], mesh, source)
    if not data.local:
        values = values[(slice(None), slice(None), *partition.owned_slices(partition.comm.rank))]
    tensor = torch.as_tensor(np.ascontiguousarray(values), dtype=torch.float64)
    present = tensor.isnan().logical_not_()
    finite = torch.isfinite(tensor)
    _raise_on_all(_not_finite(present if missing == "mask" else finite, finite, data, source, missing), mesh)
    # All ranks have a mask if one of them does.
    lacks = mesh.max(torch.tensor([int(not bool(present.all()))])).item()
    found = Samples(partition, tensor, torch.from_numpy(times))
    return replace(found, values=tensor.nan_to_num(), present=present) if lacks else found


def joined(data: Iterator[TrajectoryData], source: str) -> TrajectoryData:
    """One trajectory after the other, sampled at the same times, as one. Raises `ConfigurationError`."""
    every = list(data)
    if not every:
        raise ConfigurationError(f"{source}: gave no trajectory")
    for number, one in enumerate(every):
        if not isinstance(one, TrajectoryData):
            raise ConfigurationError(f"{source}: trajectory {number} is {_described(one)}: must be a TrajectoryData")
    arrays = [_array(one.values, source) for one in every]
    for number, array in enumerate(arrays):
        if array.shape != arrays[0].shape or not np.array_equal(every[number].times, every[0].times):
            raise ConfigurationError(
                f"{source}: trajectory {number} has shape {array.shape} and must have the shape {arrays[0].shape} and "
                "the times of trajectory 0"
            )
    return replace(every[0], values=np.stack(arrays))


def _array(values: Any, source: str) -> npt.NDArray[Any]:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise ConfigurationError(f"{source}: values are of type {array.dtype}: must be real numbers")
    return array


def _times(given: Any, count: int, source: str) -> tuple[npt.NDArray[Any], str]:
    """The times, and what is wrong with them."""
    times: npt.NDArray[Any] = np.asarray(given)
    if times.dtype.kind not in "fiu" or times.ndim > 1:
        return np.zeros(0), f"{source}: times is {_described(given)}: must be numbers [time], or the interval"
    if times.ndim == 0:
        if not (np.isfinite(times) and times > 0):
            return np.zeros(0), f"{source}: times = {given}: the interval must be greater than 0"
        return np.arange(count) * float(times), ""
    times = times.astype(np.float64)
    if len(times) != count:
        return times, f"{source}: there are {len(times)} times: must be {count}, one for each sample in values"
    for number, (before, after) in enumerate(pairwise(times)):
        if not after > before:
            return times, f"{source}: times must increase: times[{number + 1}] = {after:g} comes after {before:g}"
    return times, ""


def _not_finite(wanted: torch.Tensor, finite: torch.Tensor, data: TrajectoryData, source: str, missing: str) -> str:
    wrong = ~wanted if missing != "mask" else wanted & ~finite
    if not bool(wrong.any()):
        return ""
    trajectory, time = (int(number) for number in wrong.nonzero()[0, :2])
    label = f" ({data.labels[time]})" if len(data.labels) > time else ""
    count = int(wrong.sum())
    hint = '; [problem] missing = "mask" leaves missing values out of the loss' if missing != "mask" else ""
    return (
        f"{source}: {count} value{'s are' if count > 1 else ' is'} not finite, the first in trajectory {trajectory} at "
        f"time {time}{label}{hint}"
    )


def _check_alike(key: Any, shape: tuple[int, ...], mesh: Mesh, source: str) -> None:
    """Raise `ConfigurationError` on all ranks if they were given different numbers of samples or other times."""
    found = mesh.broadcast_object(mesh.gather_object((key, shape)))
    for rank, (other, there) in enumerate(found):
        if other != found[0][0]:
            raise ConfigurationError(
                f"{source}: the ranks have different data: rank 0 has {_counts(found[0][1])}, rank {rank} "
                f"{_counts(there) if there != found[0][1] else 'other times'}"
            )


def _counts(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} trajector{'y' if shape[0] == 1 else 'ies'} of {shape[1]} times"


def _raise_on_all(wrong: str, mesh: Mesh) -> None:
    """Raise `ConfigurationError` on all ranks if something is wrong on one of them. Collective on the world."""

    def check() -> None:
        if wrong:
            raise ConfigurationError(wrong)

    agreed(mesh, check)


def _described(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:60]
