"""Run directory: exclusive write access, and the files of a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from mpi4py import MPI
from torch import nn

from pnode_dist.config.tables import Config
from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.distributed.sharding import gather_state_dict, shards_of
from pnode_dist.errors import ConfigurationError
from pnode_dist.runs import snapshot_files, tensorboard
from pnode_dist.runs.heartbeat import HEARTBEAT
from pnode_dist.runs.lock import LOCK, RunLock
from pnode_dist.system.atomic_file import remove_unfinished, write_atomically
from pnode_dist.system.json_lines import json_line

CONFIG, VERSIONS, METRICS, MODEL = "config.toml", "versions.json", "metrics.jsonl", "model.pt"
EVALUATION, FORECAST_PICTURE, PAGE = "evaluation.json", "report.png", "report.html"
ANALYSIS, RECORD, FREE_RUNS = "analysis.h5", "record", "free_runs.gif"
FILES = (
    *(CONFIG, VERSIONS, METRICS, MODEL, "forecast.h5", ANALYSIS),
    *(EVALUATION, FORECAST_PICTURE, FREE_RUNS, PAGE, HEARTBEAT),
)
"""All files that the package writes to a run directory, besides snapshots and the record of an inversion. No other
files are ever removed."""

Result = TypeVar("Result")


def on_root(mesh: Mesh, action: Callable[[], Result]) -> Result:
    """Call `action` on rank 0; return its result, or raise its `ConfigurationError`, on all ranks.

    Collective on the world.
    """
    result: Any = None
    if mesh.is_root:
        try:
            result = action()
        except ConfigurationError as error:
            result = error
    result = mesh.broadcast_object(result)
    if isinstance(result, ConfigurationError):
        raise result
    return result  # type: ignore[no-any-return]


def check_free(path: Path, overwrite: bool) -> None:
    """Raise `ConfigurationError` unless `path` does not exist, is empty, or may be overwritten."""
    try:
        occupied = any(entry.name != LOCK for entry in path.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise ConfigurationError(f"run directory {path}: there is a file of that name") from None
    except OSError as error:
        raise ConfigurationError(f"run directory {path}: cannot be read: {error.strerror}") from None
    if occupied and not overwrite:
        raise ConfigurationError(
            f"run directory {path}: is not empty: choose another with --run-dir, or --overwrite it"
        )


@contextmanager
def held(path: Path, mesh: Mesh) -> Iterator[RunLock | None]:
    """Lock the run directory inside the context; yield the lock on rank 0 and None elsewhere.

    A missing directory is created, accessible to its owner only. Raises `ConfigurationError` on all ranks if another
    run holds the lock, or if the directory cannot be created. Collective on the world.
    """
    lock: RunLock | None = None

    def hold() -> None:
        nonlocal lock

        def take() -> None:
            nonlocal lock
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
            lock = RunLock(path)

        _writing(path, take)

    on_root(mesh, hold)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def create(path: Path, config: Config, mesh: Mesh, overwrite: bool) -> None:
    """Create the run directory with `config.toml` and `versions.json`. Collective on the world.

    The directory is accessible to its owner only. With `overwrite`, the files of an earlier run are removed, and no
    others.
    Raises `ConfigurationError` on all ranks if the directory is in use or cannot be written.
    """

    def make() -> None:
        check_free(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        discard(path)

    _write(path, config, mesh, make)


def go_on(path: Path, config: Config, mesh: Mesh, step: int, metrics: int) -> None:
    """Reset a run directory to the snapshot after `step` optimiser steps. Collective on the world.

    `config.toml` and `versions.json` are rewritten, the metrics file is truncated to `metrics` bytes, and snapshots of
    later steps are removed.
    Raises `ConfigurationError` on all ranks if the directory cannot be written.
    """

    def take_back() -> None:
        for name in (*FILES, LOCK):
            remove_unfinished(path, name)
        snapshot_files.remove_after(path, step)
        with (path / METRICS).open("ab") as file:
            if file.tell() > metrics:
                file.truncate(metrics)

    _write(path, config, mesh, take_back)


def copy_metrics(source: Path, path: Path, mesh: Mesh, metrics: int) -> None:
    """Copy the first `metrics` bytes of the metrics file in `source` to `path`. Collective on the world."""

    def copy() -> None:
        with (source / METRICS).open("rb") as file:
            write_atomically(path / METRICS, file.read(metrics))

    on_root(mesh, lambda: _writing(path, copy))


def _write(path: Path, config: Config, mesh: Mesh, prepare: Callable[[], None]) -> None:
    versions = describe_versions(mesh)

    def write() -> None:
        prepare()
        write_atomically(path / CONFIG, config.to_toml().encode())
        write_atomically(path / VERSIONS, (json.dumps(versions, indent=2) + "\n").encode())

    on_root(mesh, lambda: _writing(path, write))


def _writing(path: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise ConfigurationError(f"run directory {path}: cannot be written: {error.strerror}") from None


def discard(path: Path) -> None:
    """Remove the files that a run wrote to `path`, and no others."""
    for name in FILES:
        (path / name).unlink(missing_ok=True)
        remove_unfinished(path, name)
    tensorboard.remove(path)
    snapshot_files.remove_after(path, -1)
    for evaluation in (*(path / RECORD).glob("evaluation-*.pt"), path / RECORD / "inversion.json"):
        evaluation.unlink(missing_ok=True)
    for name in (snapshot_files.DIRECTORY, RECORD):
        with suppress(OSError):
            (path / name).rmdir()


def save_evaluation(path: Path, result: dict[str, Any], mesh: Mesh) -> None:
    """Write the evaluation figures of the run in `path` as JSON. Collective on the world.

    Raises `ConfigurationError` on all ranks if the file cannot be written.
    """

    def write() -> None:
        try:
            write_atomically(path / EVALUATION, (json_line(result) + "\n").encode())
        except OSError as error:
            raise ConfigurationError(f"{path / EVALUATION}: cannot be written: {error.strerror}") from None

    on_root(mesh, write)


def describe_versions(mesh: Mesh) -> dict[str, Any]:
    """Return the versions of packages and of the MPI library, and the host and process of each rank.

    Launchers identify a killed rank by its host and process. Collective on the world.
    """
    places = mesh.broadcast_object(mesh.gather_object((socket.gethostname(), os.getpid())))
    packages = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "mpi_library": MPI.Get_library_version().split("\0")[0].splitlines()[0].strip(),
        "ranks": mesh.size,
        "mesh": {"state": mesh.state_ranks, "data": mesh.data_replicas, "backend": mesh.backend},
        "threads_per_rank": torch.get_num_threads(),
        "hosts": [host for host, _ in places],
        "processes": [process for _, process in places],
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def save_parameters(model: nn.Module, path: Path, mesh: Mesh) -> None:
    """Write the whole parameters of a model atomically, as a state_dict of tensors. Collective on the world.

    Persistent buffers, such as the running statistics of batch norms, are included; they must be the same on all
    ranks. Other buffers may hold a rank's own part of a field, and are rebuilt from the configuration.
    """
    whole = gather_state_dict(model, mesh) if mesh.replica == 0 else None
    if mesh.is_root and whole is not None:
        parameters = {name: value.detach().cpu().clone() for name, value in whole.items()}
        write_atomically(path, lambda file: torch.save(parameters, file))


def take_trained(key: str, trained: str | None, model: nn.Module, mesh: Mesh) -> None:
    """Load the parameters of the run that a `key` of the configuration names, if any. Collective on the world.

    Raises `ConfigurationError` on all ranks if they cannot be read or do not match the model.
    """
    if trained is None:
        return
    try:
        agreed(mesh, lambda: load_parameters(model, Path(trained) / MODEL))
    except ConfigurationError as error:
        raise ConfigurationError(f"{key} = {trained!r}: {error}") from None


def load_parameters(model: nn.Module, path: Path) -> None:
    """Load whole parameters from a file into `model`; each rank loads its own part of sharded parameters.

    Raises `ConfigurationError` if the parameters do not match the model. Not collective.
    """
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: there is no such file: the run has not saved its model") from None
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigurationError(f"{path}: cannot be read as saved parameters: {reason[:120]}") from None
    wanted = model.state_dict(keep_vars=True)
    if not isinstance(saved, dict) or saved.keys() != wanted.keys():
        raise ConfigurationError(f"{path}: holds other parameters than the configured model has")
    shards = shards_of(model)
    for name, value in wanted.items():
        shape = shards[name].whole_shape(value) if name in shards else tuple(value.shape)
        if saved[name].shape != shape:
            raise ConfigurationError(
                f"{path}: {name} has shape {tuple(saved[name].shape)}, in the configured model {shape}"
            )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(shards[name].part_of(saved[name]) if name in shards else saved[name])
