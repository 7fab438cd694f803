"""One self-describing file written by many ranks: named dimensions and coordinates, readable as NetCDF-4.

The file is HDF5 with dimension scales. Rank 0 creates the layout. The ranks of the first replica then write their parts
in turn. No rank holds more than its own part, and parallel HDF5 is not required.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.protocol import Index, Partition
from pnode_dist.report.turns import Writers, in_turn, write_failure

_BARE = "This is a netCDF dimension but not a netCDF variable."


@dataclass(frozen=True)
class Later:
    """Stands for values of this shape that `pnode_dist.report.dataset_stream.DatasetStream` writes later."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Variable:
    """An array with named dimensions. It is a coordinate if its name equals that of its only dimension.

    `values` is the whole array, the same on every rank. With `partition` it is this rank's part, and its last axes are
    those of the partition. `dtype` is the dtype in the file. Strings are stored unchanged. `Later` stands for values
    that are not computed yet.
    """

    dimensions: tuple[str, ...]
    values: Any
    attributes: Mapping[str, Any] = field(default_factory=dict)
    dtype: Any = None
    partition: Partition | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        shape = tuple(np.shape(self.values))
        if self.partition is None:
            return shape
        return (*shape[: len(shape) - len(self.partition.global_shape)], *self.partition.global_shape)


class OtherChannels:
    """A partition with `count` entries along its last axis, which every rank owns whole. None removes the axis."""

    def __init__(self, partition: Partition, count: int | None = None) -> None:
        self.comm, self._partition = partition.comm, partition
        self._last = () if count is None else (count,)
        self.global_shape = (*partition.global_shape[:-1], *self._last)
        self.local_shape = (*partition.local_shape[:-1], *self._last)

    def owned_slices(self, rank: int) -> Index:
        """Return the slices owned by `rank`."""
        return (*self._partition.owned_slices(rank)[:-1], *(slice(0, count) for count in self._last))


def write_dataset(
    path: Path,
    variables: Mapping[str, Variable],
    mesh: Mesh,
    attributes: Mapping[str, Any] | None = None,
    bare: Collection[str] = (),
    over: Writers = "world",
) -> None:
    """Write the variables and the global `attributes` as one file. Collective on `over`.

    A dimension without a coordinate gets the numbers 0, 1, ..., unless `bare` names it. NaN marks missing values of
    floating types. With `over="state"` each replica writes a file of its own.

    Raises `ConfigurationError` on all ranks of `over` when the file cannot be written.
    """

    def create() -> None:
        try:
            create_dataset(path, variables, attributes or {}, bare)
        except OSError as error:
            raise write_failure(path, error) from None

    partitioned = [variable.partition for variable in variables.values() if variable.partition is not None]
    in_turn(
        create,
        lambda: _write_part(path, variables),
        partitioned[0] if partitioned else None,
        mesh,
        over,
    )


def create_dataset(
    path: Path, variables: Mapping[str, Variable], attributes: Mapping[str, Any], bare: Collection[str]
) -> None:
    """Lay out all variables, and write those that are not distributed. Call on one rank.

    Raises `OSError` when the file cannot be written.
    """
    sizes: dict[str, int] = {}
    for name, variable in variables.items():
        for dimension, size in zip(variable.dimensions, variable.shape, strict=True):
            if sizes.setdefault(dimension, size) != size:
                raise ValueError(f"{name}: dimension {dimension} has {size} entries, elsewhere {sizes[dimension]}")
    coordinates = {name: variables.get(name, Variable((name,), np.arange(size))) for name, size in sizes.items()}
    with h5py.File(path, "w") as file:
        file.attrs.update({"Conventions": "CF-1.8", **attributes})
        for name, variable in coordinates.items():
            # NetCDF's reserved name of a scale for a dimension without a coordinate.
            is_bare = name in bare and name not in variables
            scale = f"{_BARE}{sizes[name]:10d}" if is_bare else name
            _lay_out(file, name, variable).make_scale(scale)
        for name, variable in variables.items():
            if name in coordinates:
                continue
            stored = _lay_out(file, name, variable)
            for number, dimension in enumerate(variable.dimensions):
                stored.dims[number].attach_scale(file[dimension])


def _lay_out(file: h5py.File, name: str, variable: Variable) -> h5py.Dataset:
    if variable.partition is not None or isinstance(variable.values, Later):
        stored = file.create_dataset(name, variable.shape, variable.dtype or np.float32, fillvalue=np.nan)
        stored.attrs["_FillValue"] = np.array(np.nan, dtype=stored.dtype)
    else:
        values = as_numpy(variable.values)
        if values.dtype.kind in "SUO":
            stored = file.create_dataset(name, data=values.astype(str).astype(object), dtype=h5py.string_dtype())
        else:
            values = values.astype(np.int8 if values.dtype.kind == "b" else values.dtype.newbyteorder("="))
            stored = file.create_dataset(name, data=values, dtype=variable.dtype)
    stored.attrs.update({key: value for key, value in variable.attributes.items() if value not in ("", None)})
    return stored


def _write_part(path: Path, variables: Mapping[str, Variable]) -> None:
    """Write this rank's parts into the existing file."""
    try:
        with h5py.File(path, "r+") as file:
            for name, variable in variables.items():
                partition = variable.partition
                if partition is None:
                    continue
                values = as_numpy(variable.values)
                owned = partition.owned_slices(partition.comm.rank)
                leading = (slice(None),) * (values.ndim - len(owned))
                if 0 not in values.shape:
                    file[name][(*leading, *owned)] = values.astype(file[name].dtype)
    except OSError as error:
        raise write_failure(path, error) from None


def as_numpy(values: Any) -> npt.NDArray[Any]:
    """Return values as an array of the host."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
