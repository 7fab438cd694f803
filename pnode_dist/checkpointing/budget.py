"""Memory and disk budgets for checkpoints, and the agreement of all ranks on the number of checkpoints."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
from mpi4py import MPI

from pnode_dist.errors import ConfigurationError
from pnode_dist.system import scratch
from pnode_dist.system.memory import default_ram

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_MOST_CHECKPOINTS = 2**31
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*\Z")
AUTO = "auto"
KEEP_LEVELS = (AUTO, "solution", "stages", "graph")
SCHEDULES = (AUTO, "all", "revolve", "multistage", "h-revolve")
CHECKPOINT_TYPES = ("float64", "float32")
SPILL_ERROR_POLICIES = ("recompute", "raise")


def parse_size(size: int | str) -> int:
    """Parse a number of bytes, such as `4096`, `"64MiB"` or `"1.5 GB"`.

    Raises `ConfigurationError` for anything else, and for negative numbers.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ConfigurationError(f"size = {size!r}: must be a number of bytes or a string such as '256MiB'")
    if isinstance(size, int):
        if size < 0:
            raise ConfigurationError(f"size = {size}: must not be negative")
        return size
    return _parsed(size)


@lru_cache(maxsize=64)
def _parsed(size: str) -> int:
    match = _SIZE.match(size)
    if match is None or match.group(2).lower() not in _UNITS:
        raise ConfigurationError(
            f"size = {size!r}: must be a number of bytes with one of the units B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    bytes_of_it = float(match.group(1)) * _UNITS[match.group(2).lower()]
    if bytes_of_it % 1 and _UNITS[match.group(2).lower()] == 1:
        raise ConfigurationError(f"size = {size!r}: must be a whole number of bytes, or have a unit such as MiB or GiB")
    return int(bytes_of_it)


class ScratchError(ConfigurationError):
    """The directory for checkpoints on disk cannot be used. Raised on all ranks alike."""


class Pool(Protocol):
    """A pool of slots in memory, which keeps released slots for later use."""

    def trim(self, slots: int) -> None:
        """Free unused slots, until at most `slots` are left in all."""
        ...


@dataclass
class Ledger:
    """The memory and disk in use by solves that await their backward pass, for one budget on this rank.

    `ram` and `disk` are in bytes, and `solves` is the number of these solves. `pools` are the memory pools that the
    budget is charged for.
    """

    ram: int = 0
    disk: int = 0
    solves: int = 0
    pools: WeakSet[Pool] = field(default_factory=WeakSet)

    def __reduce__(self) -> tuple[type[Ledger], tuple[()]]:
        # Copies and pickles of a budget begin with an empty ledger.
        return Ledger, ()

    def make_room(self, pool: Pool, slots: int) -> None:
        """Free the unused slots of all pools, except the `slots` that `pool` is about to use."""
        for other in self.pools:
            other.trim(slots if other is pool else 0)

    def charge(self, ram: int, disk: int) -> Callable[[], None]:
        """Charge the budget for one more solve. Returns a function that refunds it, at its first call only."""
        self.ram, self.disk, self.solves = self.ram + ram, self.disk + disk, self.solves + 1
        held = [(ram, disk)]

        def refund() -> None:
            if held:
                ram, disk = held.pop()
                self.ram, self.disk, self.solves = self.ram - ram, self.disk - disk, self.solves - 1

        return refund


@dataclass(frozen=True)
class CheckpointBudget:
    """The memory and disk that forward solves may use for their adjoints, per rank.

    Sizes
        `ram` and `disk` are budgets in bytes for checkpoints, saved stages and graphs. One checkpoint is this rank's
        part of a state. All solves that use this object and await their backward pass share the budget: each gets the
        `solves`-th part, as long as that is left. `ram = "auto"` is half of the memory that the machine, its control
        groups and Slurm leave, divided by the ranks on the node. `directory` holds the checkpoints on disk. It should
        be local to the node; the default is SLURM_TMPDIR, TMPDIR or the system's temporary directory. `ram_slots` and
        `disk_slots` set the number of checkpoints of each solve, instead of bytes.

    `keep`: the data of a step to keep besides the state before it
        - `solution`: checkpoint states only; recompute each step, but the last if its tape fits.
        - `stages`: keep the states of the stages; evaluate f on them again.
        - `graph`: keep the autograd graph of every step, like back-propagation. An error if `ram` is too small.
        - `auto`: keep graphs of the last steps and checkpoints for the others, in the fastest way within the budget.
          With `ram_slots` set, `auto` is `solution`.

        A recomputed step is recorded as graphs, or with `stages` as stages. The tape of that step is the working set.
        It comes on top of the budget while the step is reversed, and is smallest with `stages`. The initial state needs
        no checkpoint. Every tape that is held between the passes is charged, that of the last step too, which is not
        kept if it does not fit. So a network of many blocks holds no more than their budgets between the passes.

    `schedule`: the checkpoints to hold
        - `all`: the state before every step. An error if they do not fit.
        - `revolve`: binomial, in memory only.
        - `multistage`: binomial, in memory and on disk, with the fewest steps.
        - `h-revolve`: in memory and on disk, with the least time, from measured costs of the disk. For more than some
          thousand steps its plan would take seconds, and it becomes `multistage`.
        - `auto`: the schedule with the least predicted time; with `ram_slots` or `disk_slots` set, with the fewest
          steps.

        With error control the number of steps is not known beforehand, and `schedule` does not apply. Graphs are kept
        as long as they fit, otherwise checkpoints are placed online. Stages are not kept. Such a solve reserves its
        whole part of the budget, or half of it with `ram = "auto"`, until its steps are known.

    `checkpoint_dtype` is the widest type of checkpoints, which are never wider than the state. `"float32"` halves those
    of a float64 state. Each entry of a restored state then has a relative error of up to 2^-24, which affects the
    gradient, and the bits of the gradient depend on the budget. `last_solve.largest_rounding` is the error made. `auto`
    settings never choose it.

    `on_spill_error` is the action after a disk checkpoint cannot be written or read (a full disk, an I/O error, a wrong
    checksum). `recompute` warns once and continues without the disk, to the same gradient. `raise` ends the solve with
    `SpillError` on all ranks.

    Raises `ConfigurationError` for a size that cannot be parsed, a negative number or an unknown name.
    """

    ram: int | str = AUTO
    disk: int | str = 0
    directory: str | os.PathLike[str] | None = None
    ram_slots: int | None = None
    disk_slots: int | None = None
    keep: str = AUTO
    schedule: str = AUTO
    checkpoint_dtype: str = "float64"
    solves: int = 1
    on_spill_error: str = "recompute"
    ledger: Ledger = field(default_factory=Ledger, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key, allowed in (
            ("keep", KEEP_LEVELS),
            ("schedule", SCHEDULES),
            ("checkpoint_dtype", CHECKPOINT_TYPES),
            ("on_spill_error", SPILL_ERROR_POLICIES),
        ):
            value = getattr(self, key)
            if value not in allowed:
                raise ConfigurationError(f"trajectory: {key} = {value!r}: must be one of {', '.join(allowed)}")
        for key in ("ram", "disk"):
            value = getattr(self, key)
            if key == "ram" and value == AUTO:
                continue
            try:
                parse_size(value)
            except ConfigurationError as error:
                raise ConfigurationError(f"trajectory: {key}: {error}") from None
        for key, least in (("ram_slots", 0), ("disk_slots", 0), ("solves", 1)):
            value = getattr(self, key)
            if value is None and key != "solves":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(f"trajectory: {key} = {value!r}: must be a whole number of at least {least}")
        if self.keep == "graph" and self.schedule != AUTO:
            raise ConfigurationError(
                f"trajectory: schedule = {self.schedule!r}: must be 'auto' with keep = 'graph', which holds no "
                "checkpoints"
            )

    @property
    def level(self) -> str:
        """The data on the tape of a step: `graph` or `stages`."""
        return "stages" if self.keep == "stages" else "graph"

    @property
    def keeps_steps(self) -> bool:
        """True if graphs or stages of several steps may be kept."""
        if self.keep == AUTO:
            return self.ram_slots is None and self.schedule != "all"
        return self.keep != "solution"

    def slot_dtype(self, state: np.dtype[Any]) -> np.dtype[Any]:
        """Return the type of a checkpoint's entries for a state of this type: the narrower of the two."""
        return min(state, np.dtype(self.checkpoint_dtype), key=lambda dtype: dtype.itemsize)

    @property
    def scratch(self) -> Path:
        """The directory for disk checkpoints."""
        return Path(self.directory or os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())

    @property
    def ram_bytes(self) -> int:
        """This rank's budget in memory."""
        if self.ram == AUTO:
            return default_ram(MPI.COMM_WORLD.size)
        return parse_size(self.ram)

    @property
    def disk_bytes(self) -> int:
        """This rank's budget on disk."""
        return parse_size(self.disk)

    @property
    def has_disk(self) -> bool:
        """True if checkpoints on disk are allowed."""
        if self.schedule == "revolve":
            return False
        return self.disk_slots > 0 if self.disk_slots is not None else self.disk_bytes > 0


Trajectory = CheckpointBudget
"""The public alias of `CheckpointBudget`, after PETSc's TSTrajectory; the keyword of `odeint` is named after it."""

DEFAULT = CheckpointBudget()
"""The budget that all solves without one share."""


@dataclass(frozen=True)
class Slots:
    """The number of checkpoints in memory and on disk that every rank may hold for a solve.

    Tapes may take the place of checkpoints in memory. `ram_bytes` is the smallest budget of all ranks, and
    `checkpoint_bytes` the largest checkpoint.
    """

    ram: int
    disk: int
    checkpoint_bytes: int = 0
    ram_bytes: int = 0


def _is_writable(directory: Path) -> bool:
    """Return True if a directory can be made in `directory`. Permissions are not enough: root has them always."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=scratch.prefix(), dir=directory))
    except OSError:
        return False
    return True


def _left(size: int, solves: int, used: int) -> int:
    return max(min(size // solves, size - used), 0)


def _most_checkpoints(steps: int | None) -> int:
    return _MOST_CHECKPOINTS if steps is None else max(steps - 1, 0)


def slot_bounds(
    budget: CheckpointBudget,
    checkpoint_bytes: int,
    steps: int | None,
    keeps_trajectory: bool,
    disk_is_lost: bool = False,
) -> list[int]:
    """Return this rank's numbers for `agree_on_slots`, which takes the minimum of each over all ranks."""
    ledger = budget.ledger
    has_disk = budget.has_disk and not disk_is_lost
    number = -1 if steps is None else steps
    most = _most_checkpoints(steps)
    ram = _left(budget.ram_bytes, budget.solves, ledger.ram)
    if steps is None and budget.ram == AUTO:
        # The step count is unknown, so reserve the worst case, but leave half for solves inside f without a budget.
        ram //= 2
    disk = _left(budget.disk_bytes, budget.solves, ledger.disk) if has_disk else 0
    needs_disk = (
        keeps_trajectory
        and has_disk
        and (budget.ram_slots < most if budget.ram_slots is not None else most * checkpoint_bytes > ram)
    )
    unwritable = needs_disk and not _is_writable(budget.scratch)
    return [
        ram, disk, -checkpoint_bytes, number, -number, keeps_trajectory, -keeps_trajectory, -unwritable,
        -ledger.solves,
    ]  # fmt: skip


def agree_on_slots(
    budget: CheckpointBudget,
    checkpoint_bytes: int,
    steps: int | None,
    keeps_trajectory: bool,
    comm: MPI.Comm,
    disk_is_lost: bool = False,
    agreed: list[int] | None = None,
) -> Slots:
    """Return the number of checkpoints that every rank can afford. Collective on `comm`.

    A step communicates, so all ranks must follow the same schedule. Their checkpoint sizes, their budgets and the parts
    of these in use differ. The schedule therefore depends only on the number of steps, the smallest budget and the
    largest checkpoint of all ranks. A rank that owns nothing sets no limit. It is an error if the ranks have different
    numbers of steps, or if only some of them need a gradient.

    `steps` is None if their number is not known beforehand. With `disk_is_lost` the disk is not used, and no slot at
    all is valid. `agreed` is the minimum of all ranks' `slot_bounds`, if it is known already.

    Raises `ConfigurationError` on all ranks if no checkpoint fits (with the smallest budget that works) or if a rank
    cannot write its scratch directory; `RuntimeError` on all ranks if they disagree.
    """
    has_disk = budget.has_disk and not disk_is_lost
    most = _most_checkpoints(steps)
    if agreed is None:
        agreed = slot_bounds(budget, checkpoint_bytes, steps, keeps_trajectory, disk_is_lost)
        if comm.size > 1:
            bounds = np.array(agreed, dtype=np.int64)
            comm.Allreduce(MPI.IN_PLACE, bounds, MPI.MIN)
            agreed = bounds.tolist()
    ram, disk, largest, least_steps, most_steps, least_keeps, most_keeps, blocked, outstanding = agreed
    largest = -largest
    if least_steps != -most_steps:
        raise RuntimeError(f"the ranks solve different numbers of steps ({least_steps} to {-most_steps})")
    if least_keeps != -most_keeps:
        raise RuntimeError("only some ranks need a gradient of this solve: u0 or parameters must require it on all")
    if blocked:
        unwritable = has_disk and not _is_writable(budget.scratch)
        places = comm.allgather((unwritable, str(budget.scratch), socket.gethostname()))
        rank = next((number for number, place in enumerate(places) if place[0]), 0)
        raise ScratchError(
            f"trajectory: directory = {places[rank][1]!r}: must be a directory that every rank can write; rank {rank} "
            f"({places[rank][2]}) cannot"
        )

    def affordable(slots: int | None, size: int) -> int:
        if slots is not None:
            return min(slots, most)
        return min(size // largest, most) if largest else most

    slots = Slots(
        affordable(budget.ram_slots, ram),
        affordable(budget.disk_slots, disk) if has_disk else 0,
        largest,
        ram,
    )
    # For keep = "graph" the plan compares the budget with the size of the graphs, and reports it.
    checked_by_plan = budget.keep == "graph" and steps is not None and not outstanding
    if keeps_trajectory and most > 0 and slots.ram + slots.disk < 1 and not disk_is_lost and not checked_by_plan:
        least = most if budget.schedule == "all" and steps is not None else 1
        raise ConfigurationError(_too_small(budget, largest, least, -outstanding))
    return slots


def _too_small(budget: CheckpointBudget, checkpoint_bytes: int, least: int, outstanding: int) -> str:
    if budget.ram_slots is not None:
        return (
            f"trajectory: ram_slots = {budget.ram_slots}: too few checkpoints: the smallest that works is "
            f"ram_slots = {least}"
        )
    given = f"trajectory: ram = {budget.ram!r}, disk = {budget.disk!r}"
    if outstanding:
        return (
            f"{given}, solves = {budget.solves}: {outstanding} other solve(s) that await their backward pass hold "
            f"all of it: set solves = {outstanding + 1}, or give this one a Trajectory of its own"
        )
    return (
        f"{given}: too small for one checkpoint of {checkpoint_bytes} bytes on the fullest rank: the smallest that "
        f"works is ram = {least * checkpoint_bytes * budget.solves}"
    )
