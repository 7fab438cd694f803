"""Status of a run, read from the files in its directory. Read-only; requires neither MPI nor torch."""

from __future__ import annotations

import json
import math
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pnode_dist.errors import ConfigurationError
from pnode_dist.runs.heartbeat import HEARTBEAT, INTERVAL, HeartbeatRecord, read_heartbeat
from pnode_dist.runs.lock import is_alive, read_holder
from pnode_dist.system.file_clock import clock_of
from pnode_dist.system.sizes import format_size

RUNNING, DEAD, STARTING = "running", "dead", "no sign of life"


@dataclass(frozen=True)
class Status:
    """Status and progress of a run; unknown fields are None.

    `state` is `running`, `finished`, `preempted`, `failed`, `dead` (ended without a final heartbeat) or
    `no sign of life` (no heartbeat written yet). `idle_seconds` is the time since the last optimiser step, and
    `seconds_left` the time for the remaining steps at the rate so far.
    """

    directory: str
    state: str
    message: str
    step: int | None
    epoch: str | None
    progress: float | None
    loss: float | None
    steps_per_second: float | None
    idle_seconds: float | None
    seconds_left: float | None
    ranks: str | None
    host: str | None
    process: int | None
    job: str | None
    last_snapshot: str | None
    budget: str
    spilt: int | None
    peak_memory: int | None


def status_of(directory: Path) -> Status:
    """Return the status of the run in `directory`. Raises `ConfigurationError` if there is no run."""
    try:
        tables = tomllib.loads((directory / "config.toml").read_text())
    except (OSError, ValueError):
        raise ConfigurationError(f"{directory}: there is no run in this directory") from None
    beat = read_heartbeat(directory)
    trajectory = tables.get("trajectory", {})
    budget = f"{trajectory.get('ram', 'auto')} memory, {trajectory.get('disk', 0)} disk per rank"
    snapshot = _last_snapshot(directory)
    if beat is None:
        nothing: dict[str, Any] = dict.fromkeys(Status.__dataclass_fields__)
        known = {"directory": str(directory), "state": STARTING, "message": "", "last_snapshot": snapshot}
        return Status(**{**nothing, **known, "budget": budget})
    state = beat.state
    if state == RUNNING and not _is_alive(directory):
        state = DEAD
    running = state == RUNNING
    done, steps = _progress(beat)
    left = (steps - beat.step) / beat.steps_per_second if running and steps and beat.steps_per_second else None
    return Status(
        str(directory),
        state,
        beat.message,
        beat.step,
        f"{min(beat.epoch, beat.epochs)}/{beat.epochs}",
        done,
        beat.loss,
        beat.steps_per_second,
        _idle_seconds(directory, beat) if running and beat.stepped else None,
        left,
        f"{beat.ranks} ({beat.mesh}) on {beat.hosts} host(s)",
        beat.host,
        beat.pid,
        beat.job or None,
        snapshot,
        budget,
        beat.bytes_spilt,
        beat.peak_memory,
    )


def _progress(beat: HeartbeatRecord) -> tuple[float, int]:
    """Return the completed fraction of the run, and its number of steps, 0 if unknown."""
    if beat.epoch > beat.epochs:
        return 1.0, beat.step
    steps = beat.epochs * beat.epoch_steps
    return (beat.step / steps if steps else (beat.epoch - 1) / beat.epochs), steps


def _idle_seconds(directory: Path, beat: HeartbeatRecord) -> float:
    """Return the seconds since the last step.

    The clock of the run measures the time up to the last heartbeat, that of the file system the time since then.
    """
    since = clock_of(directory, f".{HEARTBEAT}.") - (directory / HEARTBEAT).stat().st_mtime
    return max(beat.written - beat.stepped, 0.0) + max(since, 0.0)


def _is_alive(directory: Path) -> bool:
    holder = read_holder(directory)
    return holder is not None and is_alive(directory, holder)


def _last_snapshot(directory: Path) -> str | None:
    labels = sorted((directory / "snapshots").glob("step-*.json"), key=lambda path: (len(path.name), path.name))
    try:
        label = json.loads(labels[-1].read_bytes())
        return f"step {label['step']}, {label['saved']}, {label['bytes']} bytes"
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return None


def follow(directory: Path, every: float = INTERVAL) -> Iterator[Status]:
    """Yield the status at each change, until the run ends. Raises `ConfigurationError` if there is no run."""
    before: Status | None = None
    while True:
        status = status_of(directory)
        if before is None or (status.state, status.step) != (before.state, before.step):
            yield status
        if status.state not in (RUNNING, STARTING):
            return
        before = status
        time.sleep(every)


def with_units(status: Status) -> dict[str, str]:
    """Format the known fields of the status by name, with units."""
    units: dict[str, Callable[[Any], str]] = {
        "progress": lambda share: f"{100 * share:.1f} %",
        "loss": lambda loss: f"{loss:.6g}",
        "steps_per_second": lambda rate: f"{rate:.3g} steps/s",
        "idle_seconds": lambda seconds: f"{seconds:.1f} s",
        "seconds_left": _duration,
        "last_snapshot": _with_size,
        "spilt": lambda size: f"{format_size(size)} of all ranks",
        "peak_memory": lambda size: f"{format_size(size)} of all ranks",
    }
    names = {"steps_per_second": "rate", "idle_seconds": "since last step", "seconds_left": "time left"}
    known = {name: value for name, value in vars(status).items() if value not in (None, "")}
    return {names.get(name, name): units.get(name, str)(value) for name, value in known.items()}


def _with_size(label: str) -> str:
    """Format the label of a snapshot, with a human-readable size."""
    rest, _, size = label.removesuffix(" bytes").rpartition(", ")
    return f"{rest}, {format_size(int(size))}"


def _duration(seconds: float) -> str:
    """Format seconds as `42 s`, `3 min 20 s` or `5 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def in_words(status: Status) -> str:
    """Format the status as one line."""
    parts = [status.state]
    if status.step is not None:
        parts.append(f"step {status.step}, epoch {status.epoch}, {100 * (status.progress or 0):.1f} %")
    if status.loss is not None and math.isfinite(status.loss):
        parts.append(f"loss {status.loss:.6g}")
    if status.steps_per_second:
        parts.append(f"{status.steps_per_second:.3g} steps/s")
    if status.seconds_left is not None:
        parts.append(f"{_duration(status.seconds_left)} left")
    if status.message:
        parts.append(status.message)
    return "  ".join(parts)
