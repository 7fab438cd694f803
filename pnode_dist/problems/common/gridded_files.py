"""Gridded data sets of one file, many files or in memory: opened lazily, checked against each other, read in parts.

The files are visited in a plain loop instead of by dask: a rank reads one block of each file and needs neither a
graph of tasks nor threads, and only one file is open at a time, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xarray

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.calendar import calendar_of, numbers_of, time_label
from pnode_dist.problems.common.cf_axes import Axes, Role, find_axes, shape_of
from pnode_dist.problems.common.gridded import Axis, Coordinate, GriddedData, Piece, Variable
from pnode_dist.problems.common.levels import ALL_LEVELS, LevelChoice, chosen_levels, label_of
from pnode_dist.problems.common.paths import resolve_paths

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class GriddedChoice:
    """The choice of data to read: the variables, the names of axes that attributes do not tell, and the levels.

    `units` are those to report in place of the files' own. `engine` is xarray's, by default that of the file's format.
    """

    variables: tuple[str, ...]
    axes: Mapping[Role, str] = field(default_factory=dict)
    level: LevelChoice = ALL_LEVELS
    units: tuple[str, ...] | None = None
    engine: str | None = None


@dataclass(frozen=True)
class _Described:
    """One data set: what its parts must share with those of others, and its times."""

    label: str
    opened: Callable[[], Any]
    stamps: Array
    time_units: str
    axes: dict[str, Axes]
    variables: tuple[Variable, ...]
    y: Axis
    x: Axis
    coordinates: tuple[Coordinate, ...]

    @property
    def calendar(self) -> str | None:
        return calendar_of(self.stamps)


def open_gridded(source: str | Sequence[str] | xarray.Dataset, choice: GriddedChoice) -> GriddedData:
    """Open a data set in memory, or files by path, glob or list of both; coordinates are read, variables are not.

    Several files are parts of one data set along time. They are sorted by their times. Nothing is collective.
    Raises `ConfigurationError` for files that cannot be opened or that differ in anything but their times, for times
    that are unknown, out of order, repeated or overlapping, and for what `find_axes` and `chosen_levels` refuse.
    """
    if isinstance(source, xarray.Dataset):
        parts = [_described("the data set", lambda: _kept(source), choice)]
    else:
        paths = resolve_paths(source)
        parts = [_described(path.name, _opener(path, choice.engine), choice) for path in paths]
    parts.sort(key=lambda part: float(numbers_of(part.stamps)[0]))
    for other in parts[1:]:
        _check_alike(parts[0], other)
    for before, after in pairwise(parts):
        _check_order(before, after)
    first = parts[0]
    ends = np.cumsum([0, *(len(part.stamps) for part in parts)])
    pieces = tuple(
        Piece(part.opened, part.axes, part.label, int(start), int(stop))
        for part, (start, stop) in zip(parts, pairwise(ends), strict=True)
    )
    stamps = np.concatenate([part.stamps for part in parts])
    coordinates = tuple(entry for entry in first.coordinates if _is_shared(entry, parts[1:]))
    return GriddedData(stamps, first.time_units, first.y, first.x, first.variables, coordinates, pieces)


def _is_shared(coordinate: Coordinate, others: Sequence[_Described]) -> bool:
    """Return True if a coordinate without dimensions is the same in all parts; others were compared before."""
    if coordinate.dimensions:
        return True
    values = [entry.load() for part in others for entry in part.coordinates if entry.name == coordinate.name]
    return len(values) == len(others) and all(np.array_equal(coordinate.load(), value) for value in values)


@contextmanager
def _kept(dataset: xarray.Dataset) -> Iterator[xarray.Dataset]:
    yield dataset


def _opener(path: Path, engine: str | None) -> Callable[[], Any]:
    @contextmanager
    def opened() -> Iterator[xarray.Dataset]:
        with _open(path, engine) as dataset:
            yield dataset

    return opened


def _open(path: Path, engine: str | None) -> xarray.Dataset:
    chosen = engine
    if chosen is None:
        chosen = "zarr" if path.is_dir() else "h5netcdf" if h5py.is_hdf5(path) else None
    options: dict[str, Any] = {}
    if chosen == "h5netcdf":
        # Plain HDF5 has datasets without named dimensions.
        options = {"phony_dims": "access"}
    elif chosen == "zarr":
        # A local store needs no index of its own, and not all have one.
        options = {"consolidated": False}
    try:
        return xarray.open_dataset(path, engine=chosen, decode_timedelta=False, cache=False, **options)
    except (ValueError, OSError, KeyError, TypeError, ImportError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if "decode time" in reason:
            reason = f"its times cannot be read: {reason.split('. Try opening')[0]}"
            raise ConfigurationError(f"[problem] path: {path}: {reason}") from None
        key = f"engine = {engine!r}" if engine else f"path = {str(path)!r}"
        raise ConfigurationError(f"[problem] {key}: xarray cannot open {path}: {reason}") from None


def _described(label: str, opened: Callable[[], Any], choice: GriddedChoice) -> _Described:
    with opened() as dataset:
        arrays = {name: _variable(dataset, name, label) for name in choice.variables}
        axes = {name: find_axes(array, choice.axes) for name, array in arrays.items()}
        lead, lead_axes = arrays[choice.variables[0]], axes[choice.variables[0]]
        for name in choice.variables[1:]:
            if (axes[name].time, axes[name].y, axes[name].x) != (lead_axes.time, lead_axes.y, lead_axes.x):
                raise ConfigurationError(
                    f"[problem] variable = {list(choice.variables)}: {name} has the dimensions "
                    f"{shape_of(arrays[name])} and {choice.variables[0]} {shape_of(lead)}: must share time, y and x"
                )
        if not choice.level.is_all or "level" in choice.axes:
            _check_levels(arrays, axes, choice)
        stamps, units = _times(lead, lead_axes, label)
        y, x = (_axis(lead, role, lead_axes) for role in ("y", "x"))
        variables = _variables(arrays, axes, choice)
        coordinates = _coordinates(arrays, axes, variables, opened)
        return _Described(label, opened, stamps, units, axes, variables, y, x, coordinates)


def _variable(dataset: xarray.Dataset, name: str, label: str) -> xarray.DataArray:
    if name not in dataset.data_vars:
        names = ", ".join(str(known) for known in dataset.data_vars)
        raise ConfigurationError(
            f"[problem] variable = {name!r}: not in the file {label}, which has {names or 'no variables'}"
        )
    array = dataset[name]
    if array.dtype.kind not in "fiu":
        raise ConfigurationError(f"[problem] variable = {name!r}: holds {array.dtype}, must hold numbers")
    if 0 in array.shape:
        raise ConfigurationError(
            f"[problem] variable = {name!r}: has the dimensions {shape_of(array)} in {label}: is empty"
        )
    return array


def _check_levels(arrays: dict[str, xarray.DataArray], axes: dict[str, Axes], choice: GriddedChoice) -> None:
    if all(found.level is None for found in axes.values()):
        key = "level" if not choice.level.is_all else f"axes: level = {choice.axes['level']!r}"
        dimensions = "; ".join(shape_of(array) for array in arrays.values())
        raise ConfigurationError(f"[problem] {key}: no variable has levels; the dimensions are {dimensions}")


def _times(variable: xarray.DataArray, axes: Axes, label: str) -> tuple[Array, str]:
    """The file's times, known and increasing, and the units of those that are numbers."""
    name = axes.coordinates.get("time")
    if name is None:
        # A dimension without a coordinate counts its entries.
        return np.arange(float(variable.sizes[axes.time])), ""
    coordinate = variable.coords[name]
    stamps: Array = np.atleast_1d(coordinate.to_numpy())
    about = f"[problem] variable = {str(variable.name)!r}: its time axis {name} in {label}"
    units = str(coordinate.attrs.get("units", ""))
    try:
        calendar_of(stamps)
    except ValueError as error:
        raise ConfigurationError(f"{about} holds {error}: must hold dates or numbers, all known") from None
    if "%" in units or units.startswith("day as"):
        raise ConfigurationError(f"{about} has the units {units!r}, which tell no time: write 'days since'")
    if stamps.dtype.kind in "fiu":
        if " since " in units:
            raise ConfigurationError(f"{about} holds numbers of {units!r}: must be decoded, see xarray.decode_cf")
        stamps = stamps if stamps.dtype.isnative else stamps.astype(stamps.dtype.newbyteorder("="))
    unknown = np.isnat(stamps).any() if stamps.dtype.kind == "M" else False
    values = numbers_of(stamps)
    if unknown or not np.isfinite(values).all():
        raise ConfigurationError(f"{about} has unknown times: must hold dates or numbers, all known")
    wrong = np.flatnonzero(np.diff(values) <= 0)
    if len(wrong):
        first, second = (time_label(stamp, "") for stamp in stamps[wrong[0] : wrong[0] + 2])
        fault = "stands twice" if first == second else f"is followed by {second}"
        raise ConfigurationError(f"{about} must increase: {first} {fault}")
    return stamps, units


def _axis(variable: xarray.DataArray, role: Role, axes: Axes) -> Axis:
    dimension = {"y": axes.y, "x": axes.x, "level": axes.level}[role]
    name = axes.coordinates.get(role)
    if name is None:
        return Axis(str(dimension), np.arange(variable.sizes[dimension]), {}, given=False)
    coordinate = variable.coords[name]
    values: Array = coordinate.to_numpy()
    # Libraries hold text in several ways.
    values = values.astype(str) if values.dtype.kind in "OT" else values
    return Axis(str(dimension), values, _attributes(coordinate), given=True, coordinate=name)


def _attributes(coordinate: xarray.DataArray) -> dict[str, Any]:
    """Attributes that say what a coordinate is; those that name other variables of the file are left out."""
    kinds = (str, int, float, np.number)
    left_out = ("bounds", "grid_mapping", "formula_terms", "ancillary_variables", "cell_measures", "climatology")
    return {
        str(key): value for key, value in coordinate.attrs.items() if isinstance(value, kinds) and key not in left_out
    }


def _variables(
    arrays: dict[str, xarray.DataArray], axes: dict[str, Axes], choice: GriddedChoice
) -> tuple[Variable, ...]:
    variables = []
    first = 0
    for number, (name, array) in enumerate(arrays.items()):
        units = str(array.attrs.get("units", "")) if choice.units is None else choice.units[number]
        level = single = indices = None
        labels: tuple[str, ...] = (name,)
        if axes[name].level is not None:
            whole = _axis(array, "level", axes[name])
            values = whole.values if whole.given else None
            indices = chosen_levels(choice.level, whole.name, len(whole.values), values)
            chosen = Axis(
                whole.name,
                whole.values[list(indices)],
                whole.attributes,
                given=whole.given,
                coordinate=whole.coordinate,
            )
            if choice.level.alone:
                single = chosen
            else:
                level = chosen
                unit = f" {whole.attributes.get('units', '')}".removesuffix(" 1").rstrip()
                labels = tuple(f"{name} at {whole.name} {label_of(value)}{unit}" for value in chosen.values)
        variables.append(Variable(name, units, level, indices, single, labels, first))
        first += len(labels)
    return tuple(variables)


def _coordinates(
    arrays: dict[str, xarray.DataArray],
    axes: dict[str, Axes],
    variables: tuple[Variable, ...],
    opened: Callable[[], Any],
) -> tuple[Coordinate, ...]:
    """The numeric coordinates beside those of the axes: two-dimensional latitudes, heights, single levels."""
    found: dict[str, Coordinate] = {}
    for array in arrays.values():
        own = axes[str(array.name)]
        taken = {own.coordinates.get(role) for role in ("time", "y", "x", "level")}
        for key, value in array.coords.items():
            name = str(key)
            dimensions = tuple(str(dimension) for dimension in value.dims)
            if name in taken or name in found or not set(dimensions) <= {own.y, own.x}:
                continue
            if value.dtype.kind in "fiu":
                load = _loader(opened, name) if dimensions else value.to_numpy().copy
                found[name] = Coordinate(name, dimensions, _attributes(value), load)
    for variable in variables:
        if variable.single is not None and variable.single.given:
            axis = variable.single
            if axis.values.dtype.kind in "fiu":
                found[axis.shown] = Coordinate(axis.shown, (), axis.attributes, axis.values[0].copy)
    return tuple(found.values())


def _loader(opened: Callable[[], Any], name: str) -> Callable[[], Array]:
    def load() -> Array:
        with opened() as dataset:
            values: Array = dataset[name].to_numpy()
            return values

    return load


def _check_alike(first: _Described, other: _Described) -> None:
    """Raise `ConfigurationError` if two parts differ in anything but their times."""

    def differ(what: str, one: Any, two: Any) -> ConfigurationError:
        return ConfigurationError(f"[problem] path: {first.label} and {other.label} differ in {what}: {one} and {two}")

    if first.calendar != other.calendar:
        raise differ("the calendar", *(part.calendar or "numbers" for part in (first, other)))
    if first.time_units != other.time_units:
        raise differ("the units of time", repr(first.time_units), repr(other.time_units))
    for one, two in zip(first.variables, other.variables, strict=True):
        if one.units != two.units:
            raise differ(f"the units of {one.name}", repr(one.units), repr(two.units))
        if (one.level is None) != (two.level is None) or one.labels != two.labels:
            raise differ(f"the levels of {one.name}", list(one.labels), list(two.labels))
    for what, a, b in (("y", first.y, other.y), ("x", first.x, other.x)):
        if a.values.shape != b.values.shape:
            raise differ(f"the grid along {what}", f"{len(a.values)} entries", len(b.values))
        if not np.array_equal(a.values, b.values):
            at = int(np.flatnonzero(a.values != b.values)[0])
            raise differ(f"the grid along {what}", f"{a.values[at]}", f"{b.values[at]} at index {at}")
    if not (first.y.given and first.x.given):
        _check_planes_alike(first, other, differ)


def _check_planes_alike(first: _Described, other: _Described, differ: Callable[..., ConfigurationError]) -> None:
    """Compare what places the cells of a grid whose axes have no values: its two-dimensional coordinates."""
    theirs = {coordinate.name: coordinate for coordinate in other.coordinates}
    for coordinate in first.coordinates:
        if len(coordinate.dimensions) != 2:
            continue
        if coordinate.name not in theirs:
            raise differ("their coordinates", coordinate.name, "none of that name")
        if not np.array_equal(coordinate.load(), theirs[coordinate.name].load(), equal_nan=True):
            raise differ("the grid", f"the {coordinate.name} of one", "those of the other")


def _check_order(before: _Described, after: _Described) -> None:
    last, first = numbers_of(before.stamps)[-1], numbers_of(after.stamps)[0]
    if first <= last:
        raise ConfigurationError(
            f"[problem] path: {before.label} and {after.label} overlap: the first ends at "
            f"{time_label(before.stamps[-1], '')}, the second begins at {time_label(after.stamps[0], '')}"
        )
