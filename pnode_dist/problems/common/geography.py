"""Checks that the rows and columns of a grid lie as the configuration says: in order, and around the globe or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.gridded import Axis, GriddedData

Array = npt.NDArray[Any]
_CIRCLE = 360.0


def is_longitude(attributes: dict[str, Any]) -> bool:
    """Return True if a coordinate with these attributes is an angle around the globe, also of a rotated grid."""
    return _is(attributes, "longitude", "degreeseast", "degreese")


def is_latitude(attributes: dict[str, Any]) -> bool:
    """Return True if a coordinate with these attributes is an angle from the equator, also of a rotated grid."""
    return _is(attributes, "latitude", "degreesnorth", "degreesn")


def _is(attributes: dict[str, Any], name: str, *units: str) -> bool:
    named = str(attributes.get("standard_name", ""))
    unit = str(attributes.get("units", "")).lower().replace("_", "").replace("degree", "degrees").replace("ss", "s")
    return named in (name, f"grid_{name}") or unit in units


def unwrapped(longitudes: Array) -> Array:
    """Longitudes along the last axis without jumps where they pass from 360 to 0 or from 180 to -180."""
    values: Array = np.unwrap(longitudes.astype(np.float64), period=_CIRCLE, axis=-1)
    return values


def check_order(axis: Axis) -> None:
    """Raise `ConfigurationError` unless the values of an axis increase, or decrease, all along it."""
    if not axis.given or axis.values.dtype.kind not in "fiu":
        return
    values = unwrapped(axis.values) if is_longitude(axis.attributes) else axis.values.astype(np.float64)
    spacing = np.diff(values)
    if not np.isfinite(values).all() or not ((spacing > 0).all() or (spacing < 0).all()):
        wrong = np.flatnonzero(~(spacing * np.sign(np.nansum(np.sign(spacing)) or 1) > 0))
        at = int(wrong[0]) if len(wrong) else 0
        pair = " and ".join(f"{value:g}" for value in axis.values[at : at + 2])
        raise ConfigurationError(
            f"[problem] variable: the values of its axis {axis.shown} must increase or decrease: {pair} are side by "
            f"side at index {at}"
        )


def check_periodic(data: GriddedData, axis: Axis) -> None:
    """Raise `ConfigurationError` if the grid shows that it does not close along the axis.

    Latitudes never do. Longitudes do where the last column is as far from the first one as columns are apart. A grid
    that has neither says nothing about it.
    """
    name = "y" if axis is data.y else "x"
    about = f"[problem] boundary: {name} cannot be periodic"
    if is_latitude(axis.attributes):
        raise ConfigurationError(f"{about}: {axis.shown} is a latitude")
    longitudes = _longitudes(data, axis)
    if longitudes is None or longitudes.shape[-1] < 2:
        return
    spacing = float(np.nanmedian(np.mod(np.diff(longitudes, axis=-1) + _CIRCLE / 2, _CIRCLE) - _CIRCLE / 2))
    gap = float(np.nanmedian(np.mod((longitudes[..., 0] - longitudes[..., -1]) * np.sign(spacing), _CIRCLE)))
    if not 0.5 * abs(spacing) <= gap <= 1.5 * abs(spacing):
        first, last = float(longitudes.reshape(-1)[0]), float(longitudes[..., -1].reshape(-1)[0])
        raise ConfigurationError(
            f"{about}: longitudes from {first:g} to {last:g} in steps of {abs(spacing):g} do not go round once"
        )


def _longitudes(data: GriddedData, axis: Axis) -> Array | None:
    """The longitudes along the axis, of one row or of all."""
    if axis.given and axis.values.dtype.kind in "fiu":
        return axis.values.astype(np.float64) if is_longitude(axis.attributes) else None
    for coordinate in data.coordinates:
        if axis is data.x and len(coordinate.dimensions) == 2 and is_longitude(coordinate.attributes):
            values = coordinate.load().astype(np.float64)
            return values if coordinate.dimensions == (data.y.name, data.x.name) else values.T
    return None
