"""Data of the field problem: the open source, the time axis, and each rank's own part, normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.cf_axes import ROLES
from pnode_dist.problems.common.geography import check_order, check_periodic
from pnode_dist.problems.common.gridded import GriddedData
from pnode_dist.problems.common.gridded_files import GriddedChoice, open_gridded
from pnode_dist.problems.common.levels import LevelChoice
from pnode_dist.problems.common.time_axis import TimeAxis, missing_times, time_axis
from pnode_dist.problems.field.config import FieldConfig, LevelIndex

Array = npt.NDArray[Any]

NO_COMMON_UNITS = "standard deviations"
_NO_VALUE = "all values are missing at"


@dataclass(frozen=True)
class Source:
    """A field that is open but not read, its time axis and the name of its mask variable, if any."""

    data: GriddedData
    time: TimeAxis
    mask: str | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.data.shape

    @property
    def channels(self) -> int:
        """Values in each cell."""
        return self.data.channels

    def read(self, owned: Sequence[tuple[int, int]]) -> tuple[Array, Array | None]:
        """Read the rows and columns `owned` of the field, `[time, y, x, channel]`, and of its mask variable.

        Values are NaN at times missing from the data.
        """
        rows, columns = owned
        values = self.data.read((0, len(self.data.stamps)), rows, columns)
        if len(values) < len(self.time):
            whole = np.full((len(self.time), *values.shape[1:]), np.nan)
            whole[self.time.positions >= 0] = values
            values = whole
        return values, None if self.mask is None else self.data.read_plane(self.mask, rows, columns)


@dataclass(frozen=True)
class Field:
    """This rank's part of a field, and properties of the whole field.

    `values` `[time, ny_local, nx_local, channel]` are normalised by the training part's `mean` and `deviation`
    `[channel]`. They are 0 outside the mask and at missing values. `inside` `[ny_local, nx_local, 1]` is 1 inside the
    mask and 0 outside. `cells` counts the cells inside on all ranks. `present`, shaped like `values`, is 1 at a value
    inside and 0 elsewhere, or None if no value inside is missing. All are float64. `counts` `[time, channel]` counts
    the values inside on all ranks. The first `training` times are for training, the rest for validation.
    """

    values: torch.Tensor
    inside: torch.Tensor
    present: torch.Tensor | None
    counts: torch.Tensor
    cells: int
    mean: torch.Tensor
    deviation: torch.Tensor
    time: TimeAxis
    training: int
    data: GriddedData

    @property
    def channels(self) -> int:
        """Values in each cell."""
        return self.values.shape[-1]

    @property
    def name(self) -> str:
        """Names of the variables."""
        return ", ".join(variable.name for variable in self.data.variables)

    @property
    def units(self) -> str:
        """Units of errors over all channels: the channels' own units if they agree."""
        return common_units(self.data)

    @property
    def figure_scale(self) -> torch.Tensor:
        """Factors `[channel]` from a normalised difference to an error in `units`."""
        return self.deviation if len(set(self.data.units)) == 1 else torch.ones_like(self.deviation)

    @property
    def weights(self) -> torch.Tensor:
        """Weights that are 1 at a value and 0 elsewhere, shaped like `values` or broadcastable to them."""
        return self.inside if self.present is None else self.present

    @property
    def complete(self) -> torch.Tensor:
        """Mask `[time]` of the times at which no value inside is missing on any rank."""
        return (self.counts == self.cells).all(dim=-1)

    def physical(self, values: torch.Tensor) -> torch.Tensor:
        """Convert normalised values `[..., channel]` to the field's units, as float64."""
        return values.double() * self.deviation + self.mean

    def starts(self, candidates: range, steps: int) -> Sequence[int]:
        """Select from the time indices `candidates` the possible starts of a forecast.

        No value is missing at a start, and a value exists at some later time within `steps`.
        """
        if self.present is None:
            return candidates
        known, complete = self.counts.sum(dim=-1) > 0, self.complete
        return [start for start in candidates if complete[start] and known[start + 1 : start + 1 + steps].any()]

    def missing(self) -> str:
        """Readable summary of the missing values inside."""
        whole = int((self.counts.sum(dim=-1) == 0).sum())
        single = int((self.cells - self.counts[self.counts.sum(dim=-1) > 0]).sum())
        return f"{whole} of {len(self.time)} times, and {single} single values at others"

    def climatology(self) -> torch.Tensor:
        """Return the training mean of the season (calendar month) of each time, shaped like `values`.

        Falls back to the mean over all training times if these do not cover every season, and in cells without a value
        in a season.
        """
        seasons = torch.from_numpy(self.time.seasons)
        learnt = seasons[: self.training]
        if not torch.isin(seasons, learnt).all():
            seasons, learnt = torch.zeros_like(seasons), torch.zeros_like(learnt)
        number = int(seasons.max()) + 1
        sums = torch.zeros(number, *self.values.shape[1:], dtype=self.values.dtype)
        sums.index_add_(0, learnt, self.values[: self.training])
        if self.present is None:
            counts = torch.bincount(learnt, minlength=number).clamp(min=1).reshape(-1, 1, 1, 1)
            return (sums / counts)[seasons]
        terms = torch.zeros_like(sums).index_add_(0, learnt, self.present[: self.training])
        overall = sums.sum(dim=0) / terms.sum(dim=0).clamp(min=1)
        return torch.where(terms > 0, sums / terms.clamp(min=1), overall)[seasons]


def common_units(data: GriddedData) -> str:
    """Return the common units of all channels, or the units of normalised values if they differ."""
    return data.units[0] if len(set(data.units)) == 1 else NO_COMMON_UNITS


def open_source(config: FieldConfig) -> Source:
    """Open the configured field. Reads the coordinates, but not the field itself.

    Raises `ConfigurationError` for input that `open_gridded` or `time_axis` rejects, for a boundary that the grid does
    not have, for variables that cannot be added up, and for a split or window that the times do not allow.
    """
    data = open_gridded(config.paths, _choice(config))
    for axis, boundary in zip((data.y, data.x), config.boundary, strict=True):
        check_order(axis)
        if boundary == "periodic":
            check_periodic(data, axis)
    if len(set(data.units)) > 1 and config.normalisation == "none":
        units = " and ".join(map(repr, dict.fromkeys(data.units)))
        raise ConfigurationError(f"[problem] normalisation = 'none': must be 'standard' for channels in {units}")
    mask = None
    if config.mask not in ("nan", "none"):
        data.check_plane(config.mask, "mask")
        mask = config.mask
    about = f"[problem] variable = {config.variable!r}: its time axis"
    time = time_axis(data.stamps, data.time_units, config.period, config.missing, about)
    _check_split(config, len(time))
    return Source(data, time, mask)


def _choice(config: FieldConfig) -> GriddedChoice:
    units = (config.units,) if isinstance(config.units, str) else config.units
    level = config.level
    if isinstance(level, LevelIndex):
        alone = isinstance(level.index, int)
        indices = (level.index,) if isinstance(level.index, int) else level.index
        choice = LevelChoice(indices=indices, alone=alone)
    elif isinstance(level, tuple):
        choice = LevelChoice(values=level)
    else:
        choice = LevelChoice() if level == "all" else LevelChoice(values=(level,), alone=True)
    axes = {role: config.axes[role] for role in ROLES if role in config.axes}
    return GriddedChoice(config.variables, axes, choice, units, config.engine)


def _check_split(config: FieldConfig, times: int) -> None:
    if config.validation > times - 2:
        raise ConfigurationError(
            f"[problem] validation = {config.validation}: must be at most {times - 2}, as the field has {times} times"
        )
    training = times - config.validation
    if config.window > training - 1:
        raise ConfigurationError(
            f"[problem] window = {config.window}: must be at most {training - 1}, as {training} times are for training"
        )


def read_field(config: FieldConfig, source: Source, partition: GridPartition, mesh: Mesh) -> Field:
    """Read each rank's own part of the field, with the same normalisation on all ranks. Collective on the world.

    A rank reads only the rows and columns it owns. Mean and standard deviation cover the values inside the mask at the
    training times of all ranks.

    Raises `ConfigurationError` on all ranks when no cell lies inside the mask, or values inside are missing or not
    finite and the configuration does not allow for that.
    """
    training = len(source.time) - config.validation
    values, mask = agreed(mesh, lambda: source.read(partition.owned))
    if config.missing == "refuse":
        _refuse_missing_times(values, source.time, mesh)
    inside = _inside(config, values, mask, training)
    present = np.isfinite(values) & inside[..., None]
    tally = torch.from_numpy(np.concatenate([present.sum(axis=(1, 2)), np.full((1, source.channels), inside.sum())]))
    tally = mesh.sum(tally, over="state")
    counts, cells = tally[:-1], int(tally[-1, 0])
    if cells == 0:
        raise ConfigurationError(f"[problem] mask = {config.mask!r}: leaves no cell of {config.variable} inside")
    unusable: Array = np.isinf(values) if config.missing == "mask" else np.logical_not(np.isfinite(values))
    bare: Array = np.logical_not(present[:training].any(axis=0))
    faults = torch.tensor([int(unusable[:, inside].sum()), int(bare[inside].sum())])
    unknown, unlearnt = (int(total) for total in mesh.sum(faults, over="state"))
    if unknown:
        raise ConfigurationError(
            f"[problem] mask = {config.mask!r}: {unknown} values of {config.variable} inside it are not finite: "
            "mask = 'nan' leaves out the cells that are NaN at any time"
        )
    if unlearnt:
        raise ConfigurationError(
            f"[problem] mask = {config.mask!r}: {unlearnt} cells of {config.variable} inside it have no value at any "
            "training time: mask = 'nan' leaves them out"
        )
    field = torch.from_numpy(np.where(present, values, 0.0))
    factor = torch.from_numpy(inside[..., None].astype(np.float64))
    weights = None if bool((counts == cells).all()) else torch.from_numpy(present.astype(np.float64))
    mean = torch.zeros(source.channels, dtype=torch.float64)
    deviation = torch.ones(source.channels, dtype=torch.float64)
    if config.normalisation == "standard":
        learnt = factor if weights is None else weights[:training]
        mean, deviation = _moments(field[:training], learnt, counts[:training].sum(dim=0), mesh)
    return Field(
        values=(field - mean) / deviation * (factor if weights is None else weights),
        inside=factor,
        present=weights,
        counts=counts,
        cells=cells,
        mean=mean,
        deviation=deviation,
        time=source.time,
        training=training,
        data=source.data,
    )


def _refuse_missing_times(values: Array, time: TimeAxis, mesh: Mesh) -> None:
    """Raise `ConfigurationError` for times without any value of a channel that has values at other times."""
    counts = mesh.sum(torch.from_numpy((~np.isnan(values)).sum(axis=(1, 2))), over="state")
    lacking = ((counts == 0) & (counts.sum(dim=0) > 0)).any(dim=-1).numpy()
    if lacking.any():
        raise missing_times(time, np.flatnonzero(lacking), _NO_VALUE)


def _inside(config: FieldConfig, values: Array, mask: Array | None, training: int) -> Array:
    """Return the mask of this rank's cells, true inside."""
    inside = np.ones(values.shape[1:3], dtype=bool)
    if config.mask == "nan":
        missing = np.isnan(values)
        outside = missing[:training].all(axis=0) if config.missing == "mask" else missing.any(axis=0)
        inside &= ~outside.any(axis=-1)
    elif mask is not None:
        inside &= np.nan_to_num(mask.astype(np.float64)) != 0
    return inside


def _moments(
    field: torch.Tensor, weights: torch.Tensor, count: torch.Tensor, mesh: Mesh
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each channel over the state ranks. A deviation of 0 is replaced by 1."""
    mean = mesh.sum(field.sum(dim=(0, 1, 2)), over="state") / count
    squares = ((field - mean) * weights).square().sum(dim=(0, 1, 2))
    deviation = (mesh.sum(squares, over="state") / count).sqrt()
    return mean, torch.where(deviation > 0, deviation, torch.ones_like(deviation))
