"""Memory and disk budgets for a trajectory, and how all ranks agree on the checkpoints they pay for."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mpi4py import MPI

from pnode_dist.errors import ConfigurationError

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*\Z")
_UNLIMITED = 2**62
KEEP_LEVELS = ("auto", "solution", "graph")
SPILL_ERROR_POLICIES = ("recompute", "raise")


def parse_size(size: int | str) -> int:
    """A number of bytes from `4096`, `"64MiB"`, `"1.5 GB"`.

    Raises `ConfigurationError` for anything else, and for negative numbers.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ConfigurationError(f"size = {size!r}: must be a number of bytes or a string such as '256MiB'")
    if isinstance(size, int):
        if size < 0:
            raise ConfigurationError(f"size = {size}: must not be negative")
        return size
    match = _SIZE.match(size)
    if match is None or match.group(2).lower() not in _UNITS:
        raise ConfigurationError(
            f"size = {size!r}: must be a number of bytes with one of the units B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    return int(float(match.group(1)) * _UNITS[match.group(2).lower()])


def format_size(size: float) -> str:
    """Bytes for people: `format_size(3 * 2**20) == "3.0 MiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@dataclass(frozen=True)
class Trajectory:
    """What may be kept of a forward solve for its adjoint, in bytes per rank.

    `ram` and `disk` are budgets for checkpoints (one checkpoint is this rank's part of the state in PETSc's scalar
    type) of one solve that awaits its backward pass. `directory` is where the disk checkpoints go, by default
    SLURM_TMPDIR, TMPDIR or the system's temporary directory; it should be local to the node. `ram_slots` and
    `disk_slots` give numbers of checkpoints instead of bytes.

    `keep` is what may be kept of a step: `solution` only checkpoints, from which every step but the last is run
    again; `graph` the autograd graph of every step, as back-propagation does, or an error where `ram` is too small for
    them; `auto` graphs for the last steps and checkpoints for the rest, whatever needs the fewest steps within `ram`.
    With `ram_slots` given, `auto` is `solution`.

    `on_spill_error` says what follows when a disk checkpoint cannot be written or read (a full disk, an I/O error, a
    wrong checksum): `recompute` warns once and goes on without the disk, to the same gradient; `raise` ends the solve
    with `SpillError` on all ranks.
    Raises `ConfigurationError` for a size that cannot be read, a negative number or an unknown `keep`.
    """

    ram: int | str = "256MiB"
    disk: int | str = 0
    directory: str | os.PathLike[str] | None = None
    ram_slots: int | None = None
    disk_slots: int | None = None
    keep: str = "auto"
    on_spill_error: str = "recompute"

    def __post_init__(self) -> None:
        if self.keep not in KEEP_LEVELS:
            raise ConfigurationError(f"trajectory: keep = {self.keep!r}: must be one of {', '.join(KEEP_LEVELS)}")
        if self.on_spill_error not in SPILL_ERROR_POLICIES:
            raise ConfigurationError(
                f"trajectory: on_spill_error = {self.on_spill_error!r}: must be one of "
                f"{', '.join(SPILL_ERROR_POLICIES)}"
            )
        for key in ("ram", "disk"):
            try:
                parse_size(getattr(self, key))
            except ConfigurationError as error:
                raise ConfigurationError(f"trajectory: {key}: {error}") from None
        for key in ("ram_slots", "disk_slots"):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigurationError(f"trajectory: {key} = {value!r}: must be a whole number of checkpoints")

    @property
    def keeps_graphs(self) -> bool:
        """Whether graphs of several steps may be kept."""
        return self.keep == "graph" or (self.keep == "auto" and self.ram_slots is None)

    @property
    def scratch(self) -> Path:
        """The directory for disk checkpoints."""
        return Path(self.directory or os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())


@dataclass(frozen=True)
class Slots:
    """What every rank may hold of a solve: checkpoints in memory and on disk, and the graphs of the last steps.

    `graphs` counts the last step, whose graph always outlives the forward pass. `checkpoint_bytes` is the size of a
    checkpoint on the rank where it is largest.
    """

    ram: int
    disk: int
    graphs: int = 1
    checkpoint_bytes: int = 0


def _is_writable(directory: Path) -> bool:
    """Whether a directory can be made in `directory`: permissions alone do not tell, for root they are always there."""
    try:
        os.rmdir(tempfile.mkdtemp(dir=directory))
    except OSError:
        return False
    return True


def _affordable(slots: int | None, budget: int | str, checkpoint_bytes: int) -> int:
    if slots is not None:
        return slots
    return parse_size(budget) // checkpoint_bytes if checkpoint_bytes else _UNLIMITED


def agree_on_slots(
    trajectory: Trajectory, checkpoint_bytes: int, steps: int, keeps_trajectory: bool, comm: MPI.Comm
) -> Slots:
    """The number of checkpoints that every rank can afford. Collective on `comm`.

    All ranks must follow the same schedule, because a step communicates, while their shares of the state and so
    their bytes per checkpoint differ. The schedule depends on nothing but the number of steps and of slots: the
    slots are the minimum over all ranks, and a number of steps that differs between ranks is an error, as is a solve
    whose gradient only some ranks ask for. A rank that owns nothing sets no limit.

    Raises `ConfigurationError` on all ranks when no checkpoint fits (naming the smallest budget that works) or the
    scratch directory of a rank cannot be written; `RuntimeError` on all ranks when they disagree.
    """
    ram = _affordable(trajectory.ram_slots, trajectory.ram, checkpoint_bytes)
    disk = _affordable(trajectory.disk_slots, trajectory.disk, checkpoint_bytes)
    has_disk = trajectory.disk_slots > 0 if trajectory.disk_slots is not None else parse_size(trajectory.disk) > 0
    unwritable = keeps_trajectory and has_disk and steps - 1 > ram and not _is_writable(trajectory.scratch)
    bounds = np.array(
        [ram, disk, steps, -steps, keeps_trajectory, -keeps_trajectory, -checkpoint_bytes, -unwritable], dtype=np.int64
    )
    if comm.size > 1:
        comm.Allreduce(MPI.IN_PLACE, bounds, MPI.MIN)
    least_ram, least_disk, least_steps, most_steps, least_keeps, most_keeps, largest, blocked = (
        int(bound) for bound in bounds
    )
    if least_steps != -most_steps:
        raise RuntimeError(f"the ranks solve different numbers of steps ({least_steps} to {-most_steps})")
    if least_keeps != -most_keeps:
        raise RuntimeError("only some ranks need a gradient of this solve: u0 or parameters must require it on all")
    if blocked:
        raise ConfigurationError(
            f"trajectory: directory = {str(trajectory.scratch)!r}: must be a directory that every rank can write"
        )
    if keeps_trajectory and steps > 1 and least_ram + least_disk < 1:
        raise ConfigurationError(
            f"trajectory: ram = {trajectory.ram!r}, disk = {trajectory.disk!r}: too small for one checkpoint of "
            f"{-largest} bytes on the fullest rank: the smallest that works is ram = {-largest}"
        )
    most = max(steps - 1, 0)
    return Slots(min(least_ram, most), min(least_disk, most), checkpoint_bytes=-largest)
