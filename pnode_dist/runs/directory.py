"""The directory of a run: who may write there, and the files that a run leaves."""

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
FILES = (CONFIG, VERSIONS, METRICS, MODEL, "forecast.h5", EVALUATION, FORECAST_PICTURE, PAGE, HEARTBEAT)
"""All files that the project writes into a run directory, besides snapshots; no others are ever removed."""

Result = TypeVar("Result")


def on_root(mesh: Mesh, action: Callable[[], Result]) -> Result:
    """What `action` returned on rank 0, or the `ConfigurationError` it raised, on all. Collective on the world."""
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
    """Raise `ConfigurationError` unless a run may write to `path`: it is new, empty, or to be overwritten."""
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
    """Hold the run directory, which is made if it is not there, for its owner only; the lock on rank 0.

    Raises `ConfigurationError` on all ranks when another run does, or the directory cannot be made. Collective on the
    world.
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
    """Make the run directory, for its owner only, with `config.toml` and `versions.json`. Collective on the world.

    With `overwrite`, files of an earlier run are removed, and nothing else.
    Raises `ConfigurationError` on all ranks when it is not free or cannot be written.
    """

    def make() -> None:
        check_free(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        discard(path)

    _write(path, config, mesh, make)


def go_on(path: Path, config: Config, mesh: Mesh, step: int, metrics: int) -> None:
    """Take a run directory back to a snapshot: `config.toml` and `versions.json` anew, of the metrics the first so many
    bytes, and no snapshots of later steps. Collective on the world.

    Raises `ConfigurationError` on all ranks when it cannot be written.
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
    """Begin the metrics of a run directory with the first so many bytes of another's. Collective on the world."""

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
    """Remove the files that a run wrote into `path`, and no others."""
    for name in FILES:
        (path / name).unlink(missing_ok=True)
        remove_unfinished(path, name)
    tensorboard.remove(path)
    snapshot_files.remove_after(path, -1)
    with suppress(OSError):
        (path / snapshot_files.DIRECTORY).rmdir()


def save_evaluation(path: Path, result: dict[str, Any], mesh: Mesh) -> None:
    """Write the figures that evaluating the run in `path` gave, as JSON. Collective on the world.

    Raises `ConfigurationError` on all ranks when the file cannot be written.
    """

    def write() -> None:
        try:
            write_atomically(path / EVALUATION, (json_line(result) + "\n").encode())
        except OSError as error:
            raise ConfigurationError(f"{path / EVALUATION}: cannot be written: {error.strerror}") from None

    on_root(mesh, write)


def describe_versions(mesh: Mesh) -> dict[str, Any]:
    """What the run was made with: packages, MPI library, and the host and process of each rank, by which launchers name
    one that was killed. Collective on the world."""
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
    """Write a model's whole parameters as a state_dict of tensors, all at once or not at all. Collective on the world.

    Persistent buffers go with them, such as the running statistics of batch norms: they have to be the same on all
    ranks. Other buffers may hold a rank's own part of a field, and are made anew from the configuration.
    """
    whole = gather_state_dict(model, mesh) if mesh.replica == 0 else None
    if mesh.is_root and whole is not None:
        parameters = {name: value.detach().cpu().clone() for name, value in whole.items()}
        write_atomically(path, lambda file: torch.save(parameters, file))


def load_parameters(model: nn.Module, path: Path) -> None:
    """Put the whole parameters in the file into `model`, on each rank its own part of those that are sharded.

    Raises `ConfigurationError` if they are not those of this model. Not collective.
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
