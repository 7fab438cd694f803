"""Gridded data that are open and not read: axes, times, channels, and reading blocks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.cf_axes import Axes, shape_of

if TYPE_CHECKING:
    import xarray

Array = npt.NDArray[Any]
Range = tuple[int, int]

# What libraries fill floats with where nobody has said that it means nothing: netCDF's own and the climate models'.
_FILLS = (np.float64(np.float32(9.969209968386869e36)), np.float64(np.float32(1e20)), np.float64(1e20))


@dataclass(frozen=True)
class Axis:
    """A dimension of the data and its values.

    Values that are not `given` by the data count its entries. They are those of `coordinate`, which may be named
    unlike the dimension.
    """

    name: str
    values: Array
    attributes: dict[str, Any]
    given: bool = True
    coordinate: str = ""

    @property
    def shown(self) -> str:
        """The name of the coordinate that has the values."""
        return self.coordinate or self.name


@dataclass(frozen=True)
class Coordinate:
    """A coordinate on y and x, on one of them, or on neither; `load` reads it as a whole."""

    name: str
    dimensions: tuple[str, ...]
    attributes: dict[str, Any]
    load: Callable[[], Array]


@dataclass(frozen=True)
class Variable:
    """A variable of the data and the channels that it fills, from number `first` on, one for each of `labels`.

    `level` has the chosen levels where they are a dimension, `single` the one that was chosen alone, and `indices`
    their positions in the file; all are None for a variable without levels.
    """

    name: str
    units: str
    level: Axis | None
    indices: tuple[int, ...] | None
    single: Axis | None
    labels: tuple[str, ...]
    first: int

    @property
    def channels(self) -> slice:
        """The variable's channels among those of all variables."""
        return slice(self.first, self.first + len(self.labels))


@dataclass(frozen=True)
class Piece:
    """One file, which holds the times from `start` to before `stop`, and its variables' axes."""

    opened: Callable[[], AbstractContextManager[xarray.Dataset]]
    axes: Mapping[str, Axes]
    label: str
    start: int
    stop: int


@dataclass(frozen=True)
class GriddedData:
    """Variables on one grid, `[time, y, x, channel]`, of one or several files.

    `stamps` are the times as the data have them, dates or numbers in `time_units`. Every variable fills one channel,
    or one for each of its levels.
    """

    stamps: Array
    time_units: str
    y: Axis
    x: Axis
    variables: tuple[Variable, ...]
    coordinates: tuple[Coordinate, ...]
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.y.values), len(self.x.values)

    @property
    def channels(self) -> int:
        """Values in each cell."""
        return sum(len(variable.labels) for variable in self.variables)

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each channel for people."""
        return tuple(label for variable in self.variables for label in variable.labels)

    @property
    def units(self) -> tuple[str, ...]:
        """The units of each channel."""
        return tuple(variable.units for variable in self.variables for _ in variable.labels)

    def read(self, times: Range, rows: Range, columns: Range) -> Array:
        """A block `[time, y, x, channel]` as float64, NaN where a value is missing.

        No file is opened but those that hold the times, and no more of them is read than the block.
        Raises `ConfigurationError` for a file that cannot be read and for values that mean "missing" undeclared.
        """
        block = np.empty((times[1] - times[0], rows[1] - rows[0], columns[1] - columns[0], self.channels))
        for piece in self.pieces:
            start, stop = max(times[0], piece.start), min(times[1], piece.stop)
            if start >= stop:
                continue
            within = slice(start - piece.start, stop - piece.start)
            with _reading(piece.label), piece.opened() as dataset:
                for variable in self.variables:
                    part = _part(dataset[variable.name], piece.axes[variable.name], variable, within, rows, columns)
                    block[start - times[0] : stop - times[0], :, :, variable.channels] = part
        return block

    def read_plane(self, name: str, rows: Range, columns: Range) -> Array:
        """A block `[y, x]` of a variable without times, such as a mask, from the first file.

        Raises `ConfigurationError` for a file that cannot be read.
        """
        with _reading(self.pieces[0].label), self.pieces[0].opened() as dataset:
            plane = dataset[name].squeeze([key for key in dataset[name].dims if key not in (self.y.name, self.x.name)])
            plane = plane.isel({self.y.name: slice(*rows), self.x.name: slice(*columns)})
            values: Array = plane.transpose(self.y.name, self.x.name).to_numpy()
            return values

    def check_plane(self, name: str, key: str) -> None:
        """Raise `ConfigurationError` unless the first file has a variable `[y, x]` of that name."""
        with self.pieces[0].opened() as dataset:
            if name not in dataset.data_vars:
                names = ", ".join(str(known) for known in dataset.data_vars)
                raise ConfigurationError(f"[problem] {key} = {name!r}: not in the file, which has {names}")
            plane = dataset[name]
            size = {self.y.name: self.shape[0], self.x.name: self.shape[1]}
            long = {str(other): count for other, count in plane.sizes.items() if count > 1 or other in size}
            if long != size:
                raise ConfigurationError(
                    f"[problem] {key} = {name!r}: has the dimensions {shape_of(plane)}: must be {self.y.name} and "
                    f"{self.x.name} of {self.variables[0].name}"
                )


@contextmanager
def _reading(label: str) -> Iterator[None]:
    """Turn what a library raises for a file into a `ConfigurationError` that names the file."""
    try:
        yield
    except ConfigurationError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(f"[problem] path: {label} cannot be read: {reason[:200]}") from None


def _part(array: xarray.DataArray, axes: Axes, variable: Variable, times: slice, rows: Range, columns: Range) -> Array:
    """A block of one variable of one file, `[time, y, x, channel]`."""
    index: dict[str, Any] = {axes.y: slice(*rows), axes.x: slice(*columns), **dict.fromkeys(axes.single, 0)}
    order = [axes.y, axes.x]
    if axes.time is not None:
        index[axes.time] = times
        order.insert(0, axes.time)
    if axes.level is not None and variable.indices is not None:
        first, last = variable.indices[0], variable.indices[-1]
        whole = variable.indices == tuple(range(first, last + 1))
        index[axes.level] = slice(first, last + 1) if whole else list(variable.indices)
        order.append(axes.level)
    values: Array = array.isel(index).transpose(*order).to_numpy().astype(np.float64)
    values = values if axes.time is not None else values[None]
    values = values.reshape(*values.shape[:3], -1)
    for fill in _FILLS:
        if (values == fill).any():
            raise ConfigurationError(
                f"[problem] variable = {variable.name!r}: holds the value {fill:.6g}, which no attribute declares as "
                "missing: set its _FillValue"
            )
    return _valid(values, array)


def _valid(values: Array, array: xarray.DataArray) -> Array:
    """The values with NaN for those outside the variable's valid_min, valid_max or valid_range, which are packed."""
    limits = array.attrs.get("valid_range", (array.attrs.get("valid_min"), array.attrs.get("valid_max")))
    scale, offset = (float(array.encoding.get(key, value)) for key, value in (("scale_factor", 1), ("add_offset", 0)))
    low, high = (None if limit is None else float(limit) * scale + offset for limit in np.ravel(limits))
    if low is not None and high is not None and low > high:
        low, high = high, low
    # A limit in packed units is exact, unpacked ones are rounded.
    slack = abs(scale) / 2 if "scale_factor" in array.encoding else 0.0
    if low is not None:
        values = np.where(values < low - slack, np.nan, values)
    if high is not None:
        values = np.where(values > high + slack, np.nan, values)
    return values
