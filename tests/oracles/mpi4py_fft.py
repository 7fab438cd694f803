"""Spectra computed by mpi4py-fft (L. Mortensen et al., JOSS 4, 1340 (2019)) with FFTW, kept in `mpi4py_fft.json`.

    mpiexec -n 3 python -m tests.oracles.mpi4py_fft

writes the file, where mpi4py-fft 2.0.6 is installed. It divides by the number of points in its forward transform.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_suffix(".json")
SHAPES = ((8, 10), (7, 9), (5, 4, 7))


def field(shape: tuple[int, ...], kind: str) -> np.ndarray[Any, Any]:
    """A field of a formula, real or complex."""
    indices = np.indices(shape)
    phase = sum(number * index for number, index in zip((3, 5, 7), indices, strict=False)) + 1.0
    real = np.sin(phase) + 0.1 * np.cos(phase * phase)
    return real if kind == "real" else real + 1j * np.cos(2.0 * phase + 0.5)


def spectrum(shape: tuple[int, ...], kind: str) -> np.ndarray[Any, Any]:
    """The kept spectrum of `field`, not normalised: that of all wave numbers, or half of it for a real field."""
    pairs = np.array(json.loads(FILE.read_text(encoding="utf-8"))[_key(shape, kind)])
    found: np.ndarray[Any, Any] = pairs[..., 0] + 1j * pairs[..., 1]
    return found


def _key(shape: tuple[int, ...], kind: str) -> str:
    return f"{kind} {'x'.join(map(str, shape))}"


def _make() -> None:
    from mpi4py import MPI
    from mpi4py_fft import PFFT, newDistArray  # type: ignore[import-not-found]

    made = {}
    for shape in SHAPES:
        for kind, dtype in (("real", np.float64), ("complex", np.complex128)):
            transform = PFFT(MPI.COMM_WORLD, shape, dtype=dtype)
            values = newDistArray(transform, False)
            values[...] = field(shape, kind)[values.local_slice()]
            modes = newDistArray(transform, True)
            transform.forward(values, modes)
            pieces = MPI.COMM_WORLD.gather((modes.local_slice(), np.asarray(modes)))
            if pieces is not None:
                whole = np.zeros(modes.global_shape, dtype=np.complex128)
                for place, piece in pieces:
                    whole[place] = piece
                whole *= np.prod(shape)
                made[_key(shape, kind)] = np.stack([whole.real, whole.imag], axis=-1).tolist()
    if MPI.COMM_WORLD.rank == 0:
        FILE.write_text(json.dumps(made) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _make()
