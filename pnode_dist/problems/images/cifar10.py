"""Reader of CIFAR-10 as published, in its binary and in its Python form.

A. Krizhevsky: Learning multiple layers of features from tiny images, technical report, University of Toronto (2009).
Five files of 10,000 training images and one of test images: records of a label and 3,072 bytes, or a pickle of a
dictionary of `data` `[10000, 3072]` and `labels`. The bytes are the 32 x 32 points of red, then of green, then of blue,
row by row.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pnode_dist.errors import ConfigurationError

Bytes = npt.NDArray[np.uint8]
Part = tuple[Bytes, npt.NDArray[np.int64]]
"""Images `[samples, y, x, channels]` and labels `[samples]`."""

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORDS = 10_000
_CHANNELS, _EDGE = 3, 32
_PIXELS = _CHANNELS * _EDGE**2
_NAMES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
_FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")


def read_cifar10(path: str) -> tuple[Part, Part]:
    """Read the training and the test images from a folder, or from its subfolder created by the published archive.

    Raises `ConfigurationError` in one line for a file that is missing or differs from the published form. Not
    collective.
    """
    folder, suffix, read = _find(Path(path))
    try:
        parts = [read(folder / f"{name}{suffix}") for name in _NAMES]
    except ConfigurationError as error:
        raise ConfigurationError(f"[problem] path = {path!r}: {error}") from None
    images, labels = zip(*parts[:-1], strict=True)
    return (np.concatenate(images), np.concatenate(labels)), parts[-1]


def _find(path: Path) -> tuple[Path, str, Callable[[Path], Part]]:
    """Return the folder with files of one form, the suffix of their names, and the reader of a file."""
    for folder in (path / name for name in _FOLDERS):
        for suffix, read in ((".bin", _read_binary), ("", _read_python)):
            if any((folder / f"{name}{suffix}").is_file() for name in _NAMES):
                return folder, suffix, read
    state = "has none of them" if path.is_dir() else "there is no such folder"
    raise ConfigurationError(
        f"[problem] path = {str(path)!r}: {state}: must be the folder of CIFAR-10's files data_batch_1.bin to "
        "data_batch_5.bin and test_batch.bin, or of the same without .bin"
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigurationError(f"{path.name} is missing: must be there beside the others") from None
    except OSError as error:
        raise ConfigurationError(f"{path.name} cannot be read: {error.strerror}") from None


def _read_binary(path: Path) -> Part:
    content = _content(path)
    wanted = RECORDS * (1 + _PIXELS)
    if len(content) != wanted:
        raise ConfigurationError(
            f"{path.name} has {len(content)} bytes: must have {wanted}, {RECORDS} records of {1 + _PIXELS}"
        )
    records = np.frombuffer(content, np.uint8).reshape(RECORDS, 1 + _PIXELS)
    return _checked(path, records[:, 1:], records[:, 0])


def _read_python(path: Path) -> Part:
    try:
        # Keep strings of Python 2 as bytes.
        found = _Unpickler(io.BytesIO(_content(path)), encoding="bytes").load()
        pixels, labels = found[b"data"], found[b"labels"]
    except ConfigurationError:
        raise
    except Exception as error:  # A damaged pickle can raise any exception.
        raise ConfigurationError(
            f"{path.name} is damaged: must be a pickle of CIFAR-10's data and labels ({type(error).__name__})"
        ) from None
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (RECORDS, _PIXELS)):
        raise ConfigurationError(f"{path.name} has other data than bytes of the shape ({RECORDS}, {_PIXELS})")
    if not (isinstance(labels, list) and len(labels) == RECORDS and all(type(label) is int for label in labels)):
        raise ConfigurationError(f"{path.name} has other labels than a list of {RECORDS} integers")
    return _checked(path, pixels, np.array(labels))


def _checked(path: Path, pixels: Bytes, labels: npt.NDArray[Any]) -> Part:
    """Return rows of bytes as images, with their labels. Checks that each label is a class."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))
    if wrong.size:
        raise ConfigurationError(
            f"{path.name} has the label {labels[wrong[0]]} in record {wrong[0]}: must be 0 to {len(CLASSES) - 1}"
        )
    planes = pixels.reshape(-1, _CHANNELS, _EDGE, _EDGE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels.astype(np.int64)


class _Unpickler(pickle.Unpickler):
    """Unpickler restricted to the types in the published files: lists, dictionaries, numbers, strings and NumPy arrays.

    A pickle cannot refer to any other object, and so cannot run code.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return an object that a pickle may refer to. Raises `UnpicklingError` for any other."""
        if (module, name) not in _NAMEABLE:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return _NAMEABLE[module, name]


_NAMEABLE: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
