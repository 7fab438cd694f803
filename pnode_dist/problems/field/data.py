"""The data of the field problem: opening a field with xarray, its time axis, and each rank's own part of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt
import torch

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.field.config import FieldConfig

try:
    import xarray
except ModuleNotFoundError:
    raise ConfigurationError("a field problem needs xarray and h5netcdf: pip install 'pnode-dist[data]'") from None

Array = npt.NDArray[Any]

EPOCH = np.datetime64("2000-01-01T00:00:00", "ns")
DAYS_PER_YEAR = 365.2425
_IRREGULARITY = 0.1
_STEPS = {"hours": 1 / 24, "days": 1.0, "weeks": 7.0, "months": DAYS_PER_YEAR / 12, "years": DAYS_PER_YEAR}
_SHOWN_UNITS: dict[str, Literal["Y", "M", "D", "m"]] = {"years": "Y", "months": "M", "weeks": "D", "days": "D"}


@dataclass(frozen=True)
class TimeAxis:
    """When the field was taken.

    `stamps` are the file's own times (dates or numbers), `values` the same as float64: years since 2000 for dates,
    else unchanged. `step` is their mean spacing and `period` the length of the seasonal cycle, both in the units of
    `values`; `period` is None where there is no cycle.
    """

    stamps: Array
    values: Array
    step: float
    period: float | None
    units: str

    def __len__(self) -> int:
        return len(self.values)

    @property
    def phases(self) -> Array:
        """Each time's position in the cycle, from 0 to 1; all 0 where there is no cycle."""
        return np.zeros(len(self)) if self.period is None else np.mod(self.values / self.period, 1.0)

    @property
    def seasons(self) -> Array:
        """Each time's number in a cycle of `round(period / step)` steps, such as its calendar month."""
        if self.period is None:
            return np.zeros(len(self), dtype=np.int64)
        per_cycle = max(round(self.period / self.step), 1)
        elapsed = np.rint((self.values - self.values[0]) / self.period * per_cycle)
        seasons: Array = np.mod(elapsed.astype(np.int64), per_cycle)
        return seasons

    @property
    def step_name(self) -> str:
        """What one step is called in the plural: months, days, ..., or steps where it is nothing of the kind."""
        days = self.step * DAYS_PER_YEAR if self.stamps.dtype.kind == "M" else 0.0
        return next((name for name, length in _STEPS.items() if abs(days / length - 1) < _IRREGULARITY), "steps")

    def label(self, index: int) -> str:
        """A time for people: as much of the date as the steps tell apart, or the number."""
        return time_label(self.stamps[index], self.step_name)


@dataclass(frozen=True)
class Axis:
    """A dimension of the file and what it says of it, for forecasts to carry over."""

    name: str
    values: Array
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A field that is open but not read: variable `[time, y, x]` or `[time, y, x, channel]`, and its mask variable.

    `axes` are those after time. Nothing is collective here: each rank opens the file for itself.
    """

    dataset: xarray.Dataset
    variable: xarray.DataArray
    mask: xarray.DataArray | None
    time: TimeAxis
    axes: tuple[Axis, ...]
    units: str

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.variable.shape[1], self.variable.shape[2]

    @property
    def channels(self) -> int:
        """Values in each cell."""
        return self.variable.shape[3] if self.variable.ndim == 4 else 1

    def read(self, owned: Sequence[tuple[int, int]]) -> tuple[Array, Array | None]:
        """The rows and columns `owned` of the field, `[time, y, x, channel]`, and of its mask variable."""
        part = {1: slice(*owned[0]), 2: slice(*owned[1])}
        values = self.variable.isel({self.variable.dims[axis]: rows for axis, rows in part.items()}).to_numpy()
        inside = None
        if self.mask is not None:
            inside = self.mask.isel({self.mask.dims[axis - 1]: rows for axis, rows in part.items()}).to_numpy()
        return values.reshape(*values.shape[:3], self.channels).astype(np.float64), inside


@dataclass(frozen=True)
class Field:
    """This rank's part of a field, and what is known of the whole.

    `values` `[time, ny_local, nx_local, channel]` are normalised by the training part's `mean` and `deviation`
    `[channel]` and 0 outside the mask; `inside` `[ny_local, nx_local, 1]` is 1 inside and 0 outside, and `cells`
    counts the cells inside on all ranks. All are float64. The first `training` times are for training, the rest for
    validation.
    """

    values: torch.Tensor
    inside: torch.Tensor
    cells: int
    mean: torch.Tensor
    deviation: torch.Tensor
    time: TimeAxis
    training: int
    axes: tuple[Axis, ...]
    name: str
    units: str

    @property
    def channels(self) -> int:
        """Values in each cell."""
        return self.values.shape[-1]

    def physical(self, values: torch.Tensor) -> torch.Tensor:
        """Normalised values `[..., channel]` in the field's units, as float64."""
        return values.double() * self.deviation + self.mean

    def climatology(self) -> torch.Tensor:
        """For each time, the mean of the same season (calendar month) over the training part; shaped like `values`.

        The mean over all training times where they do not cover every season.
        """
        seasons = torch.from_numpy(self.time.seasons)
        learnt = seasons[: self.training]
        if not torch.isin(seasons, learnt).all():
            seasons, learnt = torch.zeros_like(seasons), torch.zeros_like(learnt)
        number = int(seasons.max()) + 1
        sums = torch.zeros(number, *self.values.shape[1:], dtype=self.values.dtype)
        sums.index_add_(0, learnt, self.values[: self.training])
        counts = torch.bincount(learnt, minlength=number).clamp(min=1).reshape(-1, 1, 1, 1)
        return (sums / counts)[seasons]


def time_label(stamp: Any, step_name: str) -> str:
    """`2009-10` for steps that are months, `2009-10-16` for days, with the hour for shorter ones; or the number."""
    if np.asarray(stamp).dtype.kind == "M":
        return str(np.datetime_as_string(stamp, unit=_SHOWN_UNITS.get(step_name, "m")))
    return f"{float(stamp):g}"


def resolve_path(path: str) -> Path:
    """Where a configured path lies; `package:NAME/FILE` is looked up in the installed package NAME.

    Raises `ConfigurationError` when the package or the file is not there.
    """
    found = Path(path)
    if path.startswith("package:"):
        package, _, inside = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigurationError(f"[problem] path = {path!r}: the Python package {package} is not installed")
        found = Path(next(iter(spec.submodule_search_locations))) / inside
    if not found.exists():
        raise ConfigurationError(f"[problem] path = {path!r}: there is no such file or directory")
    return found


def open_source(config: FieldConfig) -> Source:
    """Open the configured field; coordinates are read, the field itself is not.

    Raises `ConfigurationError` for a file that xarray cannot open, a variable that is not in it or has other
    dimensions, times that are not nearly equally spaced, and a split or window that the times do not allow.
    """
    dataset = _open(config)
    variable = _variable(dataset, config.variable, "variable")
    if variable.ndim not in (3, 4) or 0 in variable.shape:
        raise ConfigurationError(
            f"[problem] variable = {config.variable!r}: has the dimensions {_shape(variable)}: "
            "must be time, y, x and perhaps channel"
        )
    if variable.dtype.kind not in "fiu":
        raise ConfigurationError(f"[problem] variable = {config.variable!r}: holds {variable.dtype}, must hold numbers")
    mask = None
    if config.mask not in ("nan", "none"):
        mask = _variable(dataset, config.mask, "mask")
        if mask.shape != variable.shape[1:3]:
            raise ConfigurationError(
                f"[problem] mask = {config.mask!r}: has the dimensions {_shape(mask)}: "
                f"must be y, x of {_shape(variable)}"
            )
    time = _time_axis(variable, config)
    _check_split(config, len(time))
    axes = tuple(_axis(variable, name) for name in variable.dims[1:])
    units = config.units if config.units is not None else str(variable.attrs.get("units", ""))
    return Source(dataset, variable, mask, time, axes, units)


def _open(config: FieldConfig) -> xarray.Dataset:
    path = resolve_path(config.path)
    engine = config.engine
    if engine is None:
        engine = "zarr" if path.is_dir() else "h5netcdf" if h5py.is_hdf5(path) else None
    # Plain HDF5 has datasets without named dimensions.
    options: dict[str, Any] = {"phony_dims": "access"} if engine == "h5netcdf" else {}
    try:
        return xarray.open_dataset(path, engine=engine, decode_timedelta=False, cache=False, **options)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        key = f"engine = {config.engine!r}" if config.engine else f"path = {config.path!r}"
        raise ConfigurationError(f"[problem] {key}: xarray cannot open {path}: {reason[:200]}") from None


def _variable(dataset: xarray.Dataset, name: str, key: str) -> xarray.DataArray:
    if name not in dataset.data_vars:
        names = ", ".join(str(known) for known in dataset.data_vars)
        raise ConfigurationError(f"[problem] {key} = {name!r}: not in the file, which has {names or 'no variables'}")
    return dataset[name]


def _shape(variable: xarray.DataArray) -> str:
    return "(" + ", ".join(f"{name}: {size}" for name, size in variable.sizes.items()) + ")"


def _axis(variable: xarray.DataArray, name: Hashable) -> Axis:
    coordinate = variable.coords.get(name)
    if coordinate is None:
        return Axis(str(name), np.arange(variable.sizes[name]), {})
    attributes = {str(key): value for key, value in coordinate.attrs.items() if isinstance(value, str | int | float)}
    return Axis(str(name), coordinate.to_numpy(), attributes)


def _time_axis(variable: xarray.DataArray, config: FieldConfig) -> TimeAxis:
    name = variable.dims[0]
    coordinate = variable.coords.get(name)
    stamps: Array = np.arange(float(variable.sizes[name])) if coordinate is None else coordinate.to_numpy()
    units = "" if coordinate is None else str(coordinate.attrs.get("units", ""))
    about = f"[problem] variable = {config.variable!r}: its time axis {name}"
    period = config.period
    if stamps.dtype.kind == "M":
        values = (stamps - EPOCH) / np.timedelta64(1, "s") / (86400 * DAYS_PER_YEAR)
        period = 1.0 if period is None else period
        units = "years since 2000-01-01"
    elif stamps.dtype.kind in "fiu":
        values = stamps.astype(np.float64)
    else:
        raise ConfigurationError(f"{about} holds {stamps.dtype}: must hold dates of the standard calendar or numbers")
    if len(values) < 2 or not np.isfinite(values).all():
        raise ConfigurationError(f"{about} has {len(values)} times: must have two or more, all of them known")
    spacing = np.diff(values)
    step = float(values[-1] - values[0]) / len(spacing)
    at = int(np.argmax(np.abs(spacing - abs(step))))
    if step <= 0 or abs(spacing[at] - step) > _IRREGULARITY * step:
        first, second = (time_label(stamp, "days") for stamp in stamps[at : at + 2])
        raise ConfigurationError(
            f"{about}: must increase in steps equal to {_IRREGULARITY:.0%}: "
            f"between {first} and {second} lies {spacing[at]:.4g}, on average {step:.4g}"
        )
    if period is not None and period < 2 * step:
        raise ConfigurationError(
            f"[problem] period = {period:g}: must be two steps of the time axis, {2 * step:.4g}, or more"
        )
    return TimeAxis(stamps, values, step, period, units)


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
    """Each rank's own part of the field, normalised alike on all. Collective on the world.

    A rank reads no more than the rows and columns it owns. Mean and standard deviation are over the cells inside
    the mask and the training times of all ranks.
    Raises `ConfigurationError` on all ranks when no cell lies inside the mask, or values inside are not finite.
    """
    training = len(source.time) - config.validation
    values, mask = agreed(mesh, lambda: _read(config, source, partition))
    finite = np.isfinite(values)
    inside = np.ones(values.shape[1:3], dtype=bool)
    if config.mask == "nan":
        inside &= ~np.isnan(values).any(axis=(0, 3))
    elif mask is not None:
        inside &= np.nan_to_num(mask.astype(np.float64)) != 0
    missing = np.sum(~finite[:, inside])
    cells, unknown = (int(total) for total in mesh.sum(torch.tensor([inside.sum(), missing]), over="state"))
    if cells == 0:
        raise ConfigurationError(f"[problem] mask = {config.mask!r}: leaves no cell of {config.variable} inside")
    if unknown:
        raise ConfigurationError(
            f"[problem] mask = {config.mask!r}: {unknown} values of {config.variable} inside it are not finite: "
            "mask = 'nan' leaves out the cells that are NaN at any time"
        )
    field = torch.from_numpy(np.where(inside[..., None], values, 0.0))
    factor = torch.from_numpy(inside[..., None].astype(np.float64))
    mean = torch.zeros(source.channels, dtype=torch.float64)
    deviation = torch.ones(source.channels, dtype=torch.float64)
    if config.normalisation == "standard":
        mean, deviation = _moments(field[:training], factor, training * cells, mesh)
    return Field(
        values=(field - mean) / deviation * factor,
        inside=factor,
        cells=cells,
        mean=mean,
        deviation=deviation,
        time=source.time,
        training=training,
        axes=source.axes,
        name=config.variable,
        units=source.units,
    )


def _read(config: FieldConfig, source: Source, partition: GridPartition) -> tuple[Array, Array | None]:
    try:
        return source.read(partition.owned)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(f"[problem] path = {config.path!r}: cannot be read: {reason[:200]}") from None


def _moments(field: torch.Tensor, factor: torch.Tensor, count: int, mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel over the state ranks; a deviation of 0 counts as 1."""
    mean = mesh.sum(field.sum(dim=(0, 1, 2)), over="state") / count
    squares = ((field - mean) * factor).square().sum(dim=(0, 1, 2))
    deviation = (mesh.sum(squares, over="state") / count).sqrt()
    return mean, torch.where(deviation > 0, deviation, torch.ones_like(deviation))
