"""A file of named variables that is written piece by piece, while the values are computed.

Rank 0 holds the file open. The other ranks of the first replica send it their parts of a piece one after the other, so
that rank 0 holds a second part at most. It gathers the whole piece only if the parts are not contiguous.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.protocol import Index, Partition
from pnode_dist.report.dataset_file import Later, Variable, as_numpy, create_dataset
from pnode_dist.report.turns import write_failure

Place = tuple[int | slice, ...]


class DatasetStream:
    """A file like that of `write_dataset`, whose `Later` variables are written by `write`.

    As a context manager, it puts the complete file into its place at the end, and removes it after an error. Until then
    a file that is already there is unchanged. Creating and closing it is collective on the world. Both raise
    `ConfigurationError` on all ranks when the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        variables: Mapping[str, Variable],
        mesh: Mesh,
        attributes: Mapping[str, Any] | None = None,
        bare: Collection[str] = (),
    ) -> None:
        self._path, self._unfinished = path, path.with_name(f".{path.name}.unfinished")
        self._variables, self._mesh = variables, mesh
        self._file: h5py.File | None = None
        self._failure: ConfigurationError | None = None
        agreed(mesh, lambda: self._create(attributes or {}, bare) if mesh.is_root else None)
        for name, variable in variables.items():
            if variable.partition is not None and not isinstance(variable.values, Later):
                self.write(name, (), variable.values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._discard()

    def write(self, name: str, place: Place, values: Any) -> None:
        """Write values to a `place` along the leading axes of a variable, this rank's part of them.

        Collective on the state ranks. A failure is raised by `close`: all ranks go on with the computation until then.
        """
        if self._mesh.replica != 0:
            return
        variable = self._variables[name]
        part = np.ascontiguousarray(as_numpy(values), dtype=variable.dtype or np.float32)
        if variable.partition is None:
            self._put(name, place, part)
        elif variable.partition.comm.rank > 0:
            variable.partition.comm.Send(part, 0)
        else:
            self._collect(name, place, part, variable.partition)

    def close(self) -> None:
        """Put the complete file into its place. Collective on the world."""
        agreed(self._mesh, self._finish)

    def _collect(self, name: str, place: Place, own: npt.NDArray[Any], partition: Partition) -> None:
        leading = own.shape[: own.ndim - len(partition.global_shape)]
        ranges = [partition.owned_slices(rank) for rank in range(partition.comm.size)]
        # HDF5 writes a part that is not contiguous entry by entry.
        scattered = any(not isinstance(along, slice) for owned in ranges for along in owned)
        whole = np.empty((*leading, *partition.global_shape), own.dtype) if scattered else None
        for rank, owned in enumerate(ranges):
            part = own
            if rank > 0:
                part = np.empty((*leading, *_lengths(owned, partition.global_shape)), own.dtype)
                partition.comm.Recv(part, rank)
            if whole is not None:
                whole[(..., *owned)] = part
            else:
                self._put(name, (*place, *(slice(None),) * (len(leading) - _axes(place)), *owned), part)
        if whole is not None:
            self._put(name, place, whole)

    def _put(self, name: str, place: Any, values: npt.NDArray[Any]) -> None:
        if self._file is None or self._failure is not None or 0 in values.shape:
            return
        try:
            self._file[name][place] = values
        except OSError as error:
            self._failure = write_failure(self._path, error)

    def _create(self, attributes: Mapping[str, Any], bare: Collection[str]) -> None:
        try:
            if self._path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "Is a directory")
            create_dataset(self._unfinished, self._variables, attributes, bare)
            self._file = h5py.File(self._unfinished, "r+")
        except OSError as error:
            raise write_failure(self._path, error) from None

    def _finish(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            file.close()
            if self._failure is None:
                os.replace(self._unfinished, self._path)
        except OSError as error:
            self._failure = write_failure(self._path, error)
        if self._failure is not None:
            self._unfinished.unlink(missing_ok=True)
            raise self._failure

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._unfinished.unlink(missing_ok=True)


def _axes(place: Place) -> int:
    """Return the number of leading axes of the values that a place covers."""
    return sum(isinstance(along, slice) for along in place)


def _lengths(owned: Index, shape: tuple[int, ...]) -> list[int]:
    """Return the shape of the part that is owned."""
    return [
        len(range(*along.indices(size))) if isinstance(along, slice) else len(along)
        for along, size in zip(owned, shape, strict=True)
    ]
