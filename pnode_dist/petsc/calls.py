"""Functions of PETSc that petsc4py lacks, called by ctypes in the library that petsc4py has loaded."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import numpy as np
from petsc4py import PETSc

_THREADS = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}
_INTEGERS = {4: ctypes.c_int32, 8: ctypes.c_int64}


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(PETSc.__file__)


def _integer() -> Any:
    return _INTEGERS[np.dtype(PETSc.IntType).itemsize]()


def _check(code: int) -> None:
    if code:
        raise PETSc.Error(code)


@cache
def one_blas_thread() -> None:
    """Limit the BLAS of PETSc's vectors to one thread, unless the environment sets its number of threads.

    OpenBLAS starts a thread on each core for vectors of some 10,000 entries. Between two calls these threads spin, and
    take the cores from other ranks and from torch's threads.
    """
    if not _THREADS & os.environ.keys():
        limit = getattr(_library(), "openblas_set_num_threads", None)
        if limit is not None:
            limit(1)


Row = tuple[float, ...]


def register_runge_kutta(name: str, order: int, a: tuple[Row, ...], b: Row, c: Row, embedded: Row | None) -> None:
    """Add an explicit method to TSRK, which copies the coefficients (TSRKRegister). Not collective.

    `a` has one row of `len(b)` entries for each stage. `embedded` are the weights of the embedded method.
    """
    stages, entries = _integer(), ctypes.c_double * len(b)
    stages.value = len(b)
    order_, dense = _integer(), _integer()
    order_.value = order
    rows = (ctypes.c_double * len(b) ** 2)(*(entry for row in a for entry in row))
    weights = None if embedded is None else entries(*embedded)
    _check(_library().TSRKRegister(name.encode(), order_, stages, rows, entries(*b), entries(*c), weights, dense, None))


def register_diagonally_implicit(
    name: str, order: int, a: tuple[Row, ...], b: Row, c: Row, embedded: Row | None
) -> None:
    """Add a method to TSDIRK, which copies the coefficients (TSDIRKRegister). Not collective.

    The arguments are those of `register_runge_kutta`. The interpolant is linear, as for PETSc's own tables.
    """
    stages, entries = _integer(), ctypes.c_double * len(b)
    stages.value = len(b)
    order_, degree = _integer(), _integer()
    order_.value, degree.value = order, 1
    rows = (ctypes.c_double * len(b) ** 2)(*(entry for row in a for entry in row))
    estimate = None if embedded is None else entries(*embedded)
    tables = rows, entries(*b), entries(*c), estimate, degree, entries(*b)
    _check(_library().TSDIRKRegister(name.encode(), order_, stages, *tables))


def runge_kutta_tableau(ts: PETSc.TS) -> tuple[tuple[Row, ...], Row, Row, Row | None]:
    """Return the coefficients of a TS of type `rk`: A, b, c and the embedded weights (TSRKGetTableau). Not collective.

    The embedded weights are None for a method without an error estimate.
    """
    stages, order, fsal = _integer(), _integer(), ctypes.c_int()
    a, b, c, embedded, interpolant = (ctypes.POINTER(ctypes.c_double)() for _ in range(5))
    every = (stages, a, b, c, embedded, order, interpolant, fsal)
    _check(_library().TSRKGetTableau(ctypes.c_void_p(ts.handle), *map(ctypes.byref, every)))
    count = int(stages.value)
    rows = tuple(tuple(a[row * count : (row + 1) * count]) for row in range(count))
    return rows, tuple(b[:count]), tuple(c[:count]), tuple(embedded[:count]) if embedded else None


def stage_handles(ts: PETSc.TS) -> list[int]:
    """Return the handles of the stage Vecs of `ts`, as its type defines them (TSGetStages). Not collective."""
    count, vecs = _integer(), ctypes.POINTER(ctypes.c_void_p)()
    _check(_library().TSGetStages(ctypes.c_void_p(ts.handle), ctypes.byref(count), ctypes.byref(vecs)))
    return [int(vecs[number] or 0) for number in range(count.value)]


def scalars_at(address: int, size: int) -> Any:
    """Return the memory of `size` of PETSc's scalars at `address` as a buffer, which does not keep it alive."""
    return (ctypes.c_char * (size * np.dtype(PETSc.ScalarType).itemsize)).from_address(address)


def local_array(handle: int, size: int) -> np.ndarray[Any, Any]:
    """Return the `size` local entries of a Vec, given by its handle, as a view. Not collective.

    The Vec must outlive the view.
    """
    address = ctypes.c_void_p()
    vec = ctypes.c_void_p(handle)
    _check(_library().VecGetArrayRead(vec, ctypes.byref(address)))
    if size == 0:
        found = np.empty(0, dtype=PETSc.ScalarType)
    else:
        found = np.frombuffer(scalars_at(address.value or 0, size), dtype=PETSc.ScalarType)
    _check(_library().VecRestoreArrayRead(vec, ctypes.byref(address)))
    return found


def option_was_read(name: str) -> bool:
    """Return True if PETSc has read the option `name`, given without its hyphen (PetscOptionsUsed)."""
    found = ctypes.c_int()
    _check(_library().PetscOptionsUsed(None, name.encode(), ctypes.byref(found)))
    return bool(found.value)


def preallocate_coordinates(matrix: PETSc.Mat, rows: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]) -> None:
    """Give `matrix` the nonzero pattern of its entries `(rows[i], columns[i])` (MatSetPreallocationCOO).

    Negative indices are skipped. Collective on the matrix's communicator. petsc4py 3.22 lacks it.
    """
    # PETSc reorders the indices in place.
    i, j = (np.array(indices, dtype=PETSc.IntType) for indices in (rows, columns))
    count = ctypes.c_ssize_t(i.size)
    _check(_library().MatSetPreallocationCOO(ctypes.c_void_p(matrix.handle), count, *map(_address, (i, j))))


def set_coordinate_values(matrix: PETSc.Mat, values: np.ndarray[Any, Any]) -> None:
    """Set the entries of `preallocate_coordinates`, in the same order, and assemble `matrix` (MatSetValuesCOO).

    Collective on the matrix's communicator.
    """
    entries = np.ascontiguousarray(values, dtype=PETSc.ScalarType)
    insert = ctypes.c_int(int(PETSc.InsertMode.INSERT_VALUES))
    _check(_library().MatSetValuesCOO(ctypes.c_void_p(matrix.handle), _address(entries), insert))


def _address(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def total_linear_iterations(ksp: PETSc.KSP) -> int:
    """Return the number of all iterations of `ksp`, transposed solves included (KSPGetTotalIterations)."""
    count = _integer()
    _check(_library().KSPGetTotalIterations(ctypes.c_void_p(ksp.handle), ctypes.byref(count)))
    return int(count.value)
