"""The configuration of a command, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pnode_dist.config.load import RawTables, read, validated
from pnode_dist.config.registry import DEFAULT, Registered, is_built_in, resolve
from pnode_dist.config.tables import Config
from pnode_dist.errors import ConfigurationError
from pnode_dist.system.compatibility import check_mpi


def configured(path: str | Path, overrides: Sequence[str]) -> tuple[Config, Registered]:
    """The configuration as rank 0 read it, and the problem that it names, which every rank imports.

    An error that rank 0 meets in reading is raised on every rank, and of errors in importing the first rank's.
    Collective on the world.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    raw: RawTables | ConfigurationError | None = None
    if comm.rank == 0:
        try:
            raw = read(path, list(overrides))
        except ConfigurationError as error:
            raw = error
    raw = comm.bcast(raw)
    if isinstance(raw, ConfigurationError):
        raise raw
    assert raw is not None
    problem = raw.tables.get("problem")
    if isinstance(problem, dict) and not is_built_in(problem.get("type", DEFAULT)):
        # Loading PETSc is collective, and the user's module may fail on some ranks before it does that.
        check_mpi()
    failure: ConfigurationError | None = None
    try:
        config = validated(raw)
        found = resolve(config.kind, Path())
    except ConfigurationError as error:
        failure = error
    failures = [text for text in comm.allgather(None if failure is None else str(failure)) if text is not None]
    if failures:
        raise ConfigurationError(failures[0])
    return config, found
