"""Memory and disk budgets for a trajectory, and how all ranks agree on the checkpoints they pay for."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol
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
    """A number of bytes from `4096`, `"64MiB"`, `"1.5 GB"`.

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
    """Slots in memory that stay when they are given back, to be used again."""

    def trim(self, slots: int) -> None:
        """Free the memory of slots that are not in use, beyond so many in all."""
        ...


@dataclass
class Ledger:
    """What the solves that await their backward pass hold of one budget on this rank, in bytes and in number.

    `pools` are those whose memory the budget pays for.
    """

    ram: int = 0
    disk: int = 0
    solves: int = 0
    pools: WeakSet[Pool] = field(default_factory=WeakSet)

    def __reduce__(self) -> tuple[type[Ledger], tuple[()]]:
        # Copies and pickles of a budget have solves of their own.
        return Ledger, ()

    def make_room(self, pool: Pool, slots: int) -> None:
        """Before `pool` is used for so many slots: what lies idle in all pools beyond that is given back."""
        for other in self.pools:
            other.trim(slots if other is pool else 0)

    def charge(self, ram: int, disk: int) -> Callable[[], None]:
        """Book what one more solve will hold; returns what gives it back, once however often it is called."""
        self.ram, self.disk, self.solves = self.ram + ram, self.disk + disk, self.solves + 1
        held = [(ram, disk)]

        def refund() -> None:
            if held:
                ram, disk = held.pop()
                self.ram, self.disk, self.solves = self.ram - ram, self.disk - disk, self.solves - 1

        return refund


@dataclass(frozen=True)
class CheckpointBudget:
    """What may be kept of forward solves for their adjoints, in bytes per rank.

    `ram` and `disk` are budgets for checkpoints (one checkpoint is this rank's part of a state), saved stages and
    graphs. They are shared by all solves that use this object and await their backward pass: each gets the `solves`-th
    part, as long as that is left. `ram = "auto"` is half of the memory that the machine, its control groups and Slurm
    leave, divided by the ranks on the node. `directory` is where the disk checkpoints go, by default SLURM_TMPDIR,
    TMPDIR or the system's temporary directory; it should be local to the node. `ram_slots` and `disk_slots` give
    numbers of checkpoints of each solve instead of bytes.

    `keep` is what may be kept of a step besides the state before it: `solution` nothing, every step but the last is
    run again; `stages` the states of its stages, on which f is evaluated again; `graph` the autograd graph of every
    step, as back-propagation does, or an error where `ram` is too small for them; `auto` graphs for the last steps and
    checkpoints for the rest, whatever is fastest within the budget. With `ram_slots` given, `auto` is `solution`.
    Steps that are run again are recorded as graphs, with `stages` as stages: one step's recording, the working set,
    comes on top of the budget, and is smallest with `stages`. For that of the last step, which otherwise every solve
    holds from its forward pass on, `auto` pays out of the budget, or does without it; and it takes no checkpoint of the
    initial state, which is at hand. So a network of many blocks holds no more than their budgets between the passes.

    `schedule` says which checkpoints to hold: `all`, the state before every step, or an error where they do not fit;
    `revolve`, binomially in memory alone; `multistage`, binomially in memory and on disk, for the fewest steps;
    `h-revolve`, the same with the costs of the disk weighed in, as measured on the problem at hand, for the least time
    (for more than some thousand steps, where its plan would take seconds, it is `multistage`); `auto`, the one that is
    predicted to be fastest, or with `ram_slots` or `disk_slots` given the one with the fewest steps.

    Where error control chooses the steps, and their number is not known beforehand, `schedule` has no say: graphs are
    kept as long as they fit, and else checkpoints are placed as the steps go by; stages are not kept. Such a solve
    books its whole part of the budget until its steps are known, and half of what is left with `ram = "auto"`.

    `checkpoint_dtype = "float32"` halves the checkpoints: each entry of a state that is run again from one then
    carries a relative error of up to 2^-24, which reaches the gradient, and the gradient's bits depend on the budget
    (`last_solve.largest_rounding` says how much was lost). It is never chosen by itself.

    `on_spill_error` says what follows when a disk checkpoint cannot be written or read (a full disk, an I/O error, a
    wrong checksum): `recompute` warns once and goes on without the disk, to the same gradient; `raise` ends the solve
    with `SpillError` on all ranks.
    Raises `ConfigurationError` for a size that cannot be read, a negative number or an unknown name.
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
        """What a recorded step consists of: `graph` or `stages`."""
        return "stages" if self.keep == "stages" else "graph"

    @property
    def keeps_steps(self) -> bool:
        """Whether graphs or stages of several steps may be kept."""
        if self.keep == AUTO:
            return self.ram_slots is None and self.schedule != "all"
        return self.keep != "solution"

    @property
    def charges_all_tapes(self) -> bool:
        """Whether the budget pays for every recording that is kept from the forward pass, the last step's as well."""
        return self.keep == AUTO and self.keeps_steps

    @property
    def checkpoint_itemsize(self) -> int:
        """The bytes of one entry of a checkpoint."""
        return np.dtype(self.checkpoint_dtype).itemsize

    @property
    def scratch(self) -> Path:
        """The directory for disk checkpoints."""
        return Path(self.directory or os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())

    @property
    def ram_bytes(self) -> int:
        """The budget in memory of this rank."""
        if self.ram == AUTO:
            return default_ram(MPI.COMM_WORLD.size)
        return parse_size(self.ram)

    @property
    def disk_bytes(self) -> int:
        """The budget on disk of this rank."""
        return parse_size(self.disk)

    @property
    def has_disk(self) -> bool:
        """Whether there may be checkpoints on disk at all."""
        if self.schedule == "revolve":
            return False
        return self.disk_slots > 0 if self.disk_slots is not None else self.disk_bytes > 0


Trajectory = CheckpointBudget
"""The public alias of `CheckpointBudget`, after PETSc's TSTrajectory; the keyword of `odeint` is named after it."""

DEFAULT = CheckpointBudget()
"""The budget of solves that are given none; they share it."""


@dataclass(frozen=True)
class Slots:
    """What every rank may hold of a solve: so many checkpoints in memory or on disk, or as much else in their place.

    `ram_bytes` and `checkpoint_bytes` are the least budget and the largest checkpoint of all ranks.
    """

    ram: int
    disk: int
    checkpoint_bytes: int = 0
    ram_bytes: int = 0


def _is_writable(directory: Path) -> bool:
    """Whether a directory can be made in `directory`: permissions alone do not tell, for root they are always there."""
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
    """This rank's part in `agree_on_slots`, which needs the least of each of these numbers over the ranks."""
    ledger = budget.ledger
    has_disk = budget.has_disk and not disk_is_lost
    number = -1 if steps is None else steps
    most = _most_checkpoints(steps)
    ram = _left(budget.ram_bytes, budget.solves, ledger.ram)
    if steps is None and budget.ram == AUTO:
        # It books all that it may need before it knows; solves inside f, which nobody budgeted, are to find room too.
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
    """The number of checkpoints that every rank can afford. Collective on `comm`.

    All ranks must follow the same schedule, because a step communicates, while their shares of the state and so
    their bytes per checkpoint, their budgets and what other solves hold of these differ. The schedule depends on
    nothing but the number of steps and what is agreed on here: the least budget and the largest checkpoint of all
    ranks. A number of steps that differs between ranks is an error, as is a solve whose gradient only some ranks ask
    for. A rank that owns nothing sets no limit. `steps` is None where their number is not known beforehand. With
    `disk_is_lost` there is no disk, and having no slot at all is no error. `agreed` are the least of all ranks'
    `slot_bounds` where they have been found already.

    Raises `ConfigurationError` on all ranks when no checkpoint fits (naming the smallest budget that works) or the
    scratch directory of a rank cannot be written; `RuntimeError` on all ranks when they disagree.
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
    # How much the graphs of all steps need is known, and said, only later.
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
