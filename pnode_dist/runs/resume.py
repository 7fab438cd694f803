"""Selection of the snapshot to resume from, and comparison of its configuration with the current one."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pnode_dist.config.tables import Config
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.runs import directory as run_directory
from pnode_dist.runs import snapshot_files
from pnode_dist.runs.snapshot import Snapshot
from pnode_dist.runs.snapshot_files import Label, SnapshotError

MAY_CHANGE = {
    "run": {"name", "directory", "tensorboard", "hang_limit", "stop_before_end"},
    "mesh": {"state", "data", "backend"},
    "problem": {"path", "processes"},
    "trajectory": {
        "ram",
        "disk",
        "directory",
        "ram_slots",
        "disk_slots",
        "keep",
        "schedule",
        "solves",
        "on_spill_error",
    },
    "training": {"epochs", "log_every", "validate_every"},
    "snapshot": {"every_steps", "every_minutes", "keep"},
}
"""Keys that may change on resume: those for where and how long a run executes, not for what it computes."""


@dataclass(frozen=True)
class Start:
    """Starting point of a run: `snapshot`, or None for a new run.

    `in_place` resumes in the directory that contains the snapshot. With `replaces`, a new run may replace the files of
    a run that has no snapshot. `notes` are lines to be printed at the start.
    """

    snapshot: Path | None = None
    in_place: bool = False
    replaces: bool = False
    notes: tuple[str, ...] = ()


def choose_start(
    choice: str, config: Config, overwrite: bool, problem: str | None = None, accept_changed_problem: bool = False
) -> Start:
    """Resolve a value of `--resume`: `no`, `auto`, or the path of a snapshot or a run directory. Writes nothing.

    `problem` is the hash of the source of a user-defined problem.
    Raises `ConfigurationError` if the run directory is in use, the snapshot does not exist, its run had another
    configuration, or the source of its problem has changed without `accept_changed_problem`.
    """
    directory = config.run.path
    if choice == "no":
        run_directory.check_free(directory, overwrite)
        return Start()
    if choice == "auto":
        if overwrite:
            raise ConfigurationError("--overwrite replaces what --resume auto goes on from: must be one of them")
        found, notes = _newest(directory)
        if found is None:
            # Restart a run that ended before its first snapshot.
            replaces = (directory / run_directory.CONFIG).is_file()
            run_directory.check_free(directory, replaces)
            return Start(replaces=replaces, notes=notes)
        label = snapshot_files.read_label(found)
        _check_configuration(config, label, found)
        notes = (*notes, *_changed_problem(label, found, config, problem, accept_changed_problem))
        return Start(found, in_place=True, notes=notes)
    path, notes = Path(choice), ()
    if path.is_dir():
        found, notes = _newest(path)
        if found is None:
            raise ConfigurationError(f"--resume {choice}: there is no snapshot that is whole in this run directory")
        path = found
    else:
        try:
            snapshot_files.check(path)
        except SnapshotError as error:
            raise ConfigurationError(f"--resume {choice}: {error}") from None
    label = snapshot_files.read_label(path)
    _check_configuration(config, label, path)
    notes = (*notes, *_changed_problem(label, path, config, problem, accept_changed_problem))
    in_place = path.resolve().parent == (directory / snapshot_files.DIRECTORY).resolve()
    if not in_place:
        run_directory.check_free(directory, overwrite)
    return Start(path, in_place, notes=notes)


def open_run(start: Start, config: Config, mesh: Mesh, overwrite: bool) -> Snapshot | None:
    """Prepare the run directory; return the snapshot to resume from, None for a new run. Collective on the world.

    Raises `ConfigurationError` on all ranks if the configured number of epochs is less than the snapshot has completed,
    or if the directory is in use or cannot be written.
    """
    directory = config.run.path
    if start.snapshot is None:
        run_directory.create(directory, config, mesh, overwrite or start.replaces)
        return None
    snapshot = snapshot_files.load(start.snapshot)
    position = snapshot.position
    reached = position.epoch if position.losses else position.epoch - 1
    if config.training.epochs < reached:
        raise ConfigurationError(
            f"[training] epochs = {config.training.epochs}: must be at least {reached}, the epoch of the snapshot "
            f"{start.snapshot}"
        )
    if start.in_place:
        run_directory.go_on(directory, config, mesh, position.step, position.metrics)
    else:
        run_directory.create(directory, config, mesh, overwrite)
        run_directory.copy_metrics(start.snapshot.parent.parent, directory, mesh, position.metrics)
    return snapshot


def described(start: Start, snapshot: Snapshot | None, epochs: int) -> tuple[str, ...]:
    """Return the notes on the start of a run, with a line on its position if it is resumed."""
    if snapshot is None:
        return start.notes
    position = snapshot.position
    if position.epoch > epochs:
        return (*start.notes, f"there is nothing left to train: {start.snapshot} is the end of epoch {epochs}")
    return (*start.notes, f"going on after step {position.step}, in epoch {position.epoch}, from {start.snapshot}")


def _newest(directory: Path) -> tuple[Path | None, tuple[str, ...]]:
    """Return the last intact snapshot in a run directory, and notes on the damaged ones after it."""
    wrong = ""
    for step in snapshot_files.steps_in(directory):
        path = snapshot_files.path_of(directory, step)
        try:
            snapshot_files.check(path)
        except SnapshotError as error:
            wrong = wrong or f"{path} {error}"
            continue
        return path, (f"{wrong}: using that of step {step}",) if wrong else ()
    return None, (f"{wrong}: there is no other, beginning anew",) if wrong else ()


def _check_configuration(config: Config, label: Label, path: Path) -> None:
    """Raise `ConfigurationError`, which names the key, if the run of `label` cannot be resumed with `config`."""
    tables = tomllib.loads(label.config)
    before_kind, now_kind = (_kind(tables), _kind(config.model_dump(mode="json")))
    if before_kind != now_kind:
        raise ConfigurationError(f'[problem] type = "{now_kind}": must be "{before_kind}", as in the snapshot {path}')
    try:
        before = type(config).model_validate(tables).model_dump(mode="json")
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigurationError(f"snapshot {path}: its configuration is not of this version ({key})") from None
    now = config.model_dump(mode="json")
    changed = changed_key(before, now)
    if changed is not None:
        table, name = changed
        old, new = before[table].get(name), now[table].get(name)
        raise ConfigurationError(
            f"[{table}] {name} = {new!r}: must stay {old!r} to go on from {path}; --overwrite begins a new run"
        )


def _changed_problem(label: Label, path: Path, config: Config, problem: str | None, accepted: bool) -> tuple[str, ...]:
    """Return a note if the problem's source has changed; raise `ConfigurationError` unless `accepted`."""
    if label.problem is None or label.problem == problem:
        return ()
    if not accepted:
        raise ConfigurationError(
            f"[problem] type = {config.kind!r}: its source has changed since the snapshot {path}: must be the same to "
            "go on, or be accepted by --accept-changed-problem"
        )
    return (f"the source of {config.kind} has changed since {path}",)


def _kind(tables: Mapping[str, Any]) -> str:
    kind: str = tables.get("problem", {}).get("type") or "field"
    return kind


def changed_key(
    before: Mapping[str, Any], now: Mapping[str, Any], may_change: Mapping[str, set[str]] = MAY_CHANGE
) -> tuple[str, str] | None:
    """Return the first key (table and name) with a forbidden change; None if there is none."""
    for table, values in now.items():
        for name in values:
            if name not in may_change.get(table, set()) and before.get(table, {}).get(name) != values[name]:
                return table, name
    return None
