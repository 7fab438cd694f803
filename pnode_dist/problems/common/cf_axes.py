"""The roles of dimensions, time, y, x or level, by the CF conventions.

A dimension gets its role from, in this order: the configuration; the attributes of its coordinates (axis,
standard_name, units, positive); dates in its coordinate; a plain name such as `time` or `lat`. Position decides
nothing. One dimension that is left over is the level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.calendar import calendar_of

try:
    import cf_xarray  # noqa: F401  # registers the accessor `cf`
    import xarray
except ModuleNotFoundError as error:
    raise ConfigurationError(f"gridded data need {error.name}: pip install 'pnode-dist[data]'") from None

Role = Literal["time", "y", "x", "level"]
ROLES: tuple[Role, ...] = ("time", "y", "x", "level")

_CRITERIA: dict[Role, tuple[str, ...]] = {
    "time": ("T", "time"),
    "y": ("Y", "latitude"),
    "x": ("X", "longitude"),
    "level": ("Z", "vertical"),
}
_NAMES: dict[Role, tuple[str, ...]] = {
    "time": ("time",),
    "y": ("y", "lat", "latitude"),
    "x": ("x", "lon", "longitude"),
    "level": ("level", "lev", "depth", "height", "plev"),
}
# The conventions take a coordinate in units of pressure for a vertical one.
_PRESSURES = ("bar", "millibar", "decibar", "atm", "atmosphere", "pascal", "Pa", "hPa", "mbar", "mb", "dbar")


@dataclass(frozen=True)
class Axes:
    """The dimensions of a variable by role, and the one-dimensional coordinates that hold their values.

    `time` is None for a variable of a single time, whose date is then the scalar coordinate `coordinates["time"]`.
    `level` is None for a variable without one. `single` are dimensions of one entry without a role.
    """

    time: str | None
    y: str
    x: str
    level: str | None
    coordinates: Mapping[Role, str]
    single: tuple[str, ...]


def shape_of(variable: xarray.DataArray) -> str:
    """The dimensions for people: `(time: 12, lat: 6)`."""
    return "(" + ", ".join(f"{name}: {size}" for name, size in variable.sizes.items()) + ")"


def find_axes(variable: xarray.DataArray, named: Mapping[Role, str]) -> Axes:
    """The roles of the variable's dimensions; `named` gives the dimension or coordinate of some of them.

    Raises `ConfigurationError` where a role stays open, is claimed twice, or a dimension is left over.
    """
    about = f"[problem] variable = {str(variable.name)!r}"
    found, coordinates = _named(variable, named)
    by_attributes = _roles_by_attributes(variable)
    for dimension in _free(variable, found):
        roles = by_attributes.get(dimension, {})
        open_roles = [role for role in roles if role not in named]
        if len(open_roles) > 1:
            raise ConfigurationError(
                f"{about}: its dimension {dimension} has coordinates of {' and '.join(open_roles)}: must be a grid "
                f"with a dimension for each; {_what_to_write(variable)}"
            )
        for role in open_roles:
            if role in found:
                raise ConfigurationError(
                    f"{about}: its dimensions {found[role]} and {dimension} are both {role}: {_what_to_write(variable)}"
                )
            found[role] = dimension
            coordinates[role] = roles[role]
    _by_name(variable, found, coordinates)
    single = _left_over(variable, found, about)
    if "time" not in found and "time" not in coordinates:
        _scalar_time(variable, coordinates)
    lacking = [role for role in ROLES[:3] if role not in found and role not in coordinates]
    if lacking:
        raise ConfigurationError(
            f"{about}: nothing says which of its dimensions {shape_of(variable)} is {' or '.join(lacking)}: "
            f"{_what_to_write(variable)}"
        )
    for role, dimension in found.items():
        if role not in coordinates and dimension in variable.coords:
            coordinates[role] = dimension
    return Axes(found.get("time"), found["y"], found["x"], found.get("level"), coordinates, single)


def _free(variable: xarray.DataArray, found: Mapping[Role, str]) -> list[str]:
    return [str(name) for name in variable.dims if name not in found.values()]


def _what_to_write(variable: xarray.DataArray) -> str:
    has = ", ".join(str(name) for name in variable.dims)
    return f'write [problem] axes = {{ time = "...", y = "...", x = "..." }} with names out of {has}'


def _named(variable: xarray.DataArray, named: Mapping[Role, str]) -> tuple[dict[Role, str], dict[Role, str]]:
    """The dimensions and coordinates that the configuration gives."""
    found: dict[Role, str] = {}
    coordinates: dict[Role, str] = {}
    for role, name in named.items():
        # For a dimension without a coordinate xarray would make one up.
        coordinate = dict(variable.coords).get(name)
        if coordinate is not None and coordinate.ndim == 1:
            found[role], coordinates[role] = str(coordinate.dims[0]), name
        elif name in variable.dims:
            found[role] = name
        elif role == "time" and coordinate is not None and coordinate.ndim == 0:
            coordinates[role] = name
        elif role != "level":
            raise ConfigurationError(
                f"[problem] axes: {role} = {name!r}: {variable.name} has no such dimension or one-dimensional "
                f"coordinate; its dimensions are {shape_of(variable)}"
            )
    for role, dimension in found.items():
        twice = [other for other in found if other != role and found[other] == dimension]
        if twice:
            raise ConfigurationError(f"[problem] axes: {role} and {twice[0]} are both {dimension}: must differ")
    return found, coordinates


def _roles_by_attributes(variable: xarray.DataArray) -> dict[str, dict[Role, str]]:
    """For each dimension the roles that its coordinates claim, each with the coordinate that has its values.

    The coordinate with the dimension's own name goes before others.
    """
    claims: dict[Role, set[str]] = {role: set() for role in ROLES}
    known = {**variable.cf.axes, **variable.cf.coordinates}
    for role, criteria in _CRITERIA.items():
        claims[role].update(str(name) for criterion in criteria for name in known.get(criterion, ()))
    result: dict[str, dict[Role, str]] = {}
    one_dimensional = {str(name): value for name, value in variable.coords.items() if value.ndim == 1}
    for name, coordinate in one_dimensional.items():
        if _has_dates(coordinate):
            claims["time"].add(name)
        if coordinate.attrs.get("units") in _PRESSURES:
            claims["level"].add(name)
    for dimension in map(str, variable.dims):
        along = [name for name, value in one_dimensional.items() if value.dims == (dimension,)]
        own = {role for role in ROLES if dimension in claims[role] and dimension in along}
        roles: dict[Role, str] = {}
        for role in ROLES:
            names = [name for name in along if name in claims[role]]
            if names and (not own or role in own):
                roles[role] = _value_coordinate(variable, dimension, names, role)
        if roles:
            result[dimension] = roles
    return result


def _value_coordinate(variable: xarray.DataArray, dimension: str, names: list[str], role: Role) -> str:
    """Return the one of several coordinates of a dimension that has its values; dates go before numbers."""
    if role == "time":
        dated = [name for name in names if _has_dates(variable.coords[name])]
        names = dated or names
    if dimension in names:
        return dimension
    standard = [name for name in names if variable.coords[name].attrs.get("standard_name") == "time"]
    names = standard or names
    if len(names) > 1:
        raise ConfigurationError(
            f"[problem] variable = {str(variable.name)!r}: its dimension {dimension} has the coordinates "
            f'{" and ".join(names)} for {role}: write [problem] axes = {{ {role} = "{names[0]}" }} for one of them'
        )
    return names[0]


def _has_dates(coordinate: xarray.DataArray) -> bool:
    if coordinate.dtype.kind not in "MO":
        return False
    try:
        return calendar_of(np.asarray(coordinate.to_numpy())) is not None
    except ValueError:
        return False


def _by_name(variable: xarray.DataArray, found: dict[Role, str], coordinates: dict[Role, str]) -> None:
    """Give open roles to dimensions, or to the one-dimensional coordinates of dimensions, that are named so."""
    for role in ROLES:
        if role in found or role in coordinates:
            continue
        for dimension in _free(variable, found):
            if dimension.lower() in _NAMES[role]:
                found[role] = dimension
                break
            along = [str(name) for name, value in variable.coords.items() if value.dims == (dimension,)]
            names = [name for name in along if name.lower() in _NAMES[role]]
            if names:
                found[role], coordinates[role] = dimension, names[0]
                break


def _left_over(variable: xarray.DataArray, found: dict[Role, str], about: str) -> tuple[str, ...]:
    """Make the one dimension without a role the level; return those of one entry that are none.

    Only where time, y and x are known, as one of the others could be what is left over.
    """
    if any(role not in found for role in ("y", "x")):
        return ()
    free = _free(variable, found)
    if "time" not in found and not _scalar_times(variable):
        return ()
    if "level" not in found and len(free) == 1:
        found["level"] = free[0]
        return ()
    long = [name for name in free if variable.sizes[name] > 1]
    if "level" not in found and len(long) == 1:
        found["level"] = long.pop()
    if long:
        raise ConfigurationError(
            f"{about}: its dimensions {shape_of(variable)} are more than time, y, x and one level: "
            f"{', '.join(long)} must have one entry"
        )
    return tuple(name for name in free if name not in found.values())


def _scalar_times(variable: xarray.DataArray) -> list[str]:
    known = {**variable.cf.axes, **variable.cf.coordinates}
    claimed = [str(name) for criterion in _CRITERIA["time"] for name in known.get(criterion, ())]
    scalars = [name for name in dict.fromkeys(claimed) if variable.coords[name].ndim == 0]
    if scalars:
        return scalars
    # Several dates, such as that of a forecast's start, do not tell which is the time.
    dated = [str(name) for name, value in variable.coords.items() if value.ndim == 0 and _has_dates(value)]
    return dated if len(dated) == 1 else [name for name in dated if name.lower() in _NAMES["time"]]


def _scalar_time(variable: xarray.DataArray, coordinates: dict[Role, str]) -> None:
    names = _scalar_times(variable)
    if len(names) == 1:
        coordinates["time"] = names[0]
