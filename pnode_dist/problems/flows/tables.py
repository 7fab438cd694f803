"""Tables for density estimation: MAF's files, and tables included in scikit-learn.

G. Papamakarios, T. Pavlakou, I. Murray: Masked autoregressive flow for density estimation, NeurIPS 2017 (MAF), with the
steps of the code published with it. This module splits and scales the rows. It does not communicate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.flows.config import FILES

Array = npt.NDArray[Any]

_COLUMNS = {"power": 8, "miniboone": 43, "bsds300": 63}
_FEWEST_ROWS = 20
_SHUFFLE_SEED = 42
_FEWEST_VALUES = 20
# A value stands out if its share of the rows exceeds `_COMMON`, and its density times the standard deviation of the
# column exceeds `_SPIKE`. For a normal distribution that product is 0.4 at most.
_COMMON, _SPIKE = 0.05, 5.0
_CORRELATED = 0.98
_TEST, _VALIDATION = 0.2, 0.1


class Split(NamedTuple):
    """Rows `[row, column]` for training, validation and test."""

    training: Array
    validation: Array
    test: Array


# MAF's files


def published(name: str, directory: str) -> Split:
    """Load `power`, `miniboone` or `bsds300`, split and scaled as in MAF, in float32.

    Raises `ConfigurationError`, one line with the file, if it is missing, damaged or another table.
    """
    path = Path(directory) / FILES[name]
    if not path.is_file():
        raise ConfigurationError(
            f"[problem] directory = {directory!r}: must be the folder that holds {FILES[name]}, as published with MAF: "
            f"there is no file {path}"
        )
    match name:
        case "power":
            rows = _without_ties(_array(path, _COLUMNS[name]))
        case "miniboone":
            rows = _array(path, _COLUMNS[name])
        case _:
            # The file holds patches of images that are already split and scaled.
            return Split(*(rows.astype(np.float32) for rows in _groups(path, _COLUMNS[name])))
    whole = _tenths(rows)
    known = np.concatenate([whole.training, whole.validation])
    return _scaled(whole, known, np.float32)


def _array(path: Path, columns: int) -> Array:
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigurationError(f"{path}: cannot be read as an array of numpy: {_reason(error)}") from None
    return _checked(path, "", rows, columns).astype(np.float64)


def _groups(path: Path, columns: int) -> list[Array]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return [
                _checked(path, f"{name}: ", np.asarray(file[name]), columns) for name in ("train", "validation", "test")
            ]
    except (OSError, KeyError) as error:
        raise ConfigurationError(f"{path}: cannot be read as the tables of BSDS300: {_reason(error)}") from None


def _checked(path: Path, table: str, rows: Any, columns: int) -> Array:
    shape: tuple[int, ...] = getattr(rows, "shape", ())
    if len(shape) != 2 or shape[1] != columns or shape[0] < _FEWEST_ROWS:
        raise ConfigurationError(
            f"{path}: {table}holds an array of shape {shape}: must have {columns} columns and at least "
            f"{_FEWEST_ROWS} rows"
        )
    if rows.dtype.kind not in "fiu" or not np.isfinite(rows).all():
        raise ConfigurationError(f"{path}: {table}holds entries that are not finite numbers")
    found: Array = rows
    return found


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _without_ties(rows: Array) -> Array:
    """Return POWER shuffled, without two of its columns, with noise as wide as its measurement steps."""
    generator = np.random.RandomState(_SHUFFLE_SEED)
    generator.shuffle(rows)
    rows = np.delete(rows, (1, 3), axis=1)
    count = len(rows)
    voltage = 0.01 * generator.rand(count, 1)
    reactive = 0.001 * generator.rand(count, 1)
    meters = generator.rand(count, 3)
    noise = np.hstack([reactive, voltage, meters, np.zeros((count, 1))])
    return rows + noise


def _tenths(rows: Array) -> Split:
    """Split off the last tenth for test, and the last tenth of the others for validation."""
    rest, test = rows[: -(len(rows) // 10)], rows[-(len(rows) // 10) :]
    return Split(rest[: -(len(rest) // 10)], rest[-(len(rest) // 10) :], test)


# scikit-learn's tables


def embedded(name: str, seed: int) -> Split:
    """Load one of scikit-learn's tables in float64, split at random by `seed` and scaled by the training rows.

    Omits columns with few distinct values, columns with a value that stands out, and the second of two columns with a
    correlation above 0.98. Adds to each value random noise below the smallest step of its column, because the density
    of rounded values is unbounded.

    Raises `ConfigurationError` if scikit-learn is missing.
    """
    generator = np.random.default_rng(seed)
    rows = _continuous(_loader(name)(), generator)
    rows = rows[generator.permutation(len(rows))]
    test, validation = (int(share * len(rows)) for share in (_TEST, _VALIDATION))
    whole = Split(rows[test + validation :], rows[test : test + validation], rows[:test])
    return _scaled(whole, whole.training, np.float64)


def _loader(name: str) -> Callable[[], Array]:
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise ConfigurationError(
            f"[problem] density = {name!r}: the table comes with scikit-learn, which is missing: "
            "pip install 'pnode-dist[data]'"
        ) from None
    options = {"scaled": False} if name == "diabetes" else {}
    return lambda: getattr(datasets, f"load_{name}")(return_X_y=True, **options)[0].astype(np.float64)


def _continuous(rows: Array, generator: np.random.Generator) -> Array:
    """Return the columns that can have a density, without ties."""
    kept: list[Array] = []
    for column in rows.T:
        values, counts = np.unique(column, return_counts=True)
        steps = np.diff(values)
        # Ignore steps that stem from rounding errors alone.
        step = steps[steps > 1e-9 * np.abs(values).max()].min()
        share = counts.max() / len(column)
        stands_out = share > _COMMON and share / step > _SPIKE / column.std()
        if len(values) < _FEWEST_VALUES or stands_out:
            continue
        if any(abs(np.corrcoef(column, other)[0, 1]) > _CORRELATED for other in kept):
            continue
        kept.append(column + step * generator.uniform(size=len(column)))
    return np.stack(kept, axis=1)


def _scaled(whole: Split, known: Array, dtype: Any) -> Split:
    """Scale all rows to zero mean and unit deviation of the `known` rows."""
    mean, deviation = known.mean(axis=0), known.std(axis=0)
    if not (deviation > 0).all():
        raise ConfigurationError(f"the table's column {int(np.argmin(deviation))} is constant: it has no density")
    return Split(*(((rows - mean) / deviation).astype(dtype) for rows in whole))
