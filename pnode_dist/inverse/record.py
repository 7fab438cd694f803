"""The record of a minimisation on disk, from which a later one of the same problem goes on.

TAO's path follows from the results of its evaluations alone. So a record holds these results in their order, and a
resumed minimisation reads them in place of solving, until they end. It then has the state of the first one, whatever
the method: its history, its trust region, and its place within a line search.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.petsc import vectors
from pnode_dist.system.atomic_file import write_atomically

_HEADER = "inversion.json"
_RTOL = 1e-9
T = TypeVar("T")


class Record:
    """The results of evaluations in a directory: a file for each, written by the first rank. Collective on `comm`.

    `identity` describes the problem and the method; its values are strings and numbers. With `resume` the results there
    are read first. Vectors are stored in the order of the ranks, so a record is for one number of ranks.

    Raises `ConfigurationError` on all ranks if the directory cannot be used, holds a record without `resume`, or one of
    another problem.
    """

    def __init__(self, comm: MPI.Comm, directory: str | Path, identity: Mapping[str, Any], resume: bool) -> None:
        self.comm, self.directory = comm, Path(directory)
        self.number = 0
        self.stored: int = self._on_first_rank(lambda: self._opened(dict(identity), resume))

    def _opened(self, identity: dict[str, Any], resume: bool) -> int:
        header = self.directory / _HEADER
        if header.exists():
            if not resume:
                raise ConfigurationError(
                    f"record = {str(self.directory)!r}: holds a record: resume it, or name another"
                )
            found = json.loads(header.read_text())
            for name, value in identity.items():
                if found.get(name) != value:
                    raise ConfigurationError(
                        f"record = {str(self.directory)!r}: has {name} = {found.get(name)!r}, not {value!r}"
                    )
            count = 0
            while self._path(count).exists():
                count += 1
            return count
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(header, (json.dumps(identity) + "\n").encode())
        return 0

    @property
    def replays(self) -> bool:
        """True while stored results are left."""
        return self.number < self.stored

    def result(
        self, kind: str, x: PETSc.Vec, image: PETSc.Vec | None, compute: Callable[[PETSc.Vec, PETSc.Vec | None], float]
    ) -> float:
        """Return `compute(x, image)`, which fills `image`, or the stored result in its place; store a new one."""
        norm = x.norm()
        if self.replays:
            value = self._replayed(kind, norm, image)
        else:
            value = compute(x, image)
            self._store(kind, norm, value, image)
        self.number += 1
        return value

    def _replayed(self, kind: str, norm: float, image: PETSc.Vec | None) -> float:
        stored = self._on_first_rank(lambda: self._load(kind, norm))
        if image is not None:
            counts = self.comm.allgather(image.getLocalSize())
            local = torch.empty(image.getLocalSize(), dtype=torch.float64)
            whole = self._loaded.numpy() if self.comm.rank == 0 else None
            self.comm.Scatterv([whole, counts], local.numpy())
            vectors.fill(image, local)
        return stored

    def _load(self, kind: str, norm: float) -> float:
        path = self._path(self.number)
        held = torch.load(path, weights_only=True)
        if held["kind"] != kind or abs(held["norm"] - norm) > _RTOL * (1 + abs(norm)):
            raise ConfigurationError(f"record {path}: is of another point: the problem has changed")
        self._loaded: torch.Tensor = held["vector"]
        value: float = held["value"]
        return value

    def _store(self, kind: str, norm: float, value: float, image: PETSc.Vec | None) -> None:
        whole = torch.empty(0, dtype=torch.float64)
        if image is not None:
            local = vectors.view(image, (image.getLocalSize(),)).clone()
            counts = self.comm.gather(local.numel())
            if counts is not None:
                whole = torch.empty(sum(counts), dtype=torch.float64)
            self.comm.Gatherv(local.numpy(), [whole.numpy(), counts])

        def write() -> None:
            content = {"kind": kind, "norm": norm, "value": value, "vector": whole}
            write_atomically(self._path(self.number), lambda file: torch.save(content, file))

        self._on_first_rank(write)

    def _path(self, number: int) -> Path:
        return self.directory / f"evaluation-{number:06d}.pt"

    def _on_first_rank(self, action: Callable[[], T]) -> T:
        """Return the result of `action` on the first rank, on all ranks. Its errors are raised on all of them."""
        outcome: tuple[Any, str | None] = None, None
        if self.comm.rank == 0:
            try:
                outcome = action(), None
            except ConfigurationError as error:
                outcome = None, str(error)
            except (OSError, ValueError, KeyError, RuntimeError, EOFError, UnpicklingError) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                outcome = None, f"record = {str(self.directory)!r}: {reason[:160]}"
        result, failure = self.comm.bcast(outcome)
        if failure is not None:
            raise ConfigurationError(failure)
        return result  # type: ignore[no-any-return]
