"""The configuration of a command or a program, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pnode_dist.config.load import RawTables, from_tables, read, validated
from pnode_dist.config.registry import DEFAULT, Registered, is_built_in, resolve
from pnode_dist.config.tables import Config
from pnode_dist.errors import ConfigurationError
from pnode_dist.system.compatibility import check_mpi


def configured(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    problem: Callable[[], Registered] | None = None,
    name: str = "run",
) -> tuple[Config, Registered]:
    """Return the configuration as rank 0 read it, and its problem, which every rank imports. Collective on the world.

    `source` is a path, or the tables themselves for a run called `name`. `problem` finds a problem in place of the one
    that the configuration names.
    Raises `ConfigurationError` on every rank: for an error in reading that of rank 0, for one in importing that of the
    first rank that has one.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    raw: RawTables | ConfigurationError | None = None
    if comm.rank == 0:
        try:
            raw = from_tables(source, name, overrides) if isinstance(source, Mapping) else read(source, overrides)
        except ConfigurationError as error:
            raw = error
    raw = comm.bcast(raw)
    if isinstance(raw, ConfigurationError):
        raise raw
    assert raw is not None
    table = raw.tables.get("problem")
    if problem is not None or (isinstance(table, dict) and not is_built_in(table.get("type", DEFAULT))):
        # Loading PETSc is collective, and the user's module may fail on some ranks before it does that.
        check_mpi()
    failure: ConfigurationError | None = None
    try:
        found = None if problem is None else problem()
        config = validated(raw, found)
        found = found or resolve(config.kind, Path())
    except ConfigurationError as error:
        failure = error
    failures = [text for text in comm.allgather(None if failure is None else str(failure)) if text is not None]
    if failures:
        raise ConfigurationError(failures[0])
    assert found is not None
    return config, found
