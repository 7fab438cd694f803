"""Counted bytes of halo exchanges, against the minimum of any exchange, and their times.

The minimum follows from the owned ranges alone: each point in the halo of a rank's block that another rank owns,
counted once. The transposed exchange returns the cotangents to these ranks and has the same minimum.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mpi4py import MPI

from pnode_dist.bench.report import Check, Report, Row
from pnode_dist.exchange import halo
from pnode_dist.partition.grid import GridPartition, Rule

REPEATS = 40
_WARM_UP = 5


class CountingComm(MPI.Intracomm):
    """Communicator that counts the messages sent through it, and their bytes.

    Counts only `Isend`, the call that exchanges use. Messages sent by other calls are not counted.
    """

    messages: int
    bytes: int

    def __new__(cls, comm: MPI.Intracomm) -> CountingComm:
        """Wrap the same communicator with counters at 0. Not collective."""
        counting = super().__new__(cls, comm)
        counting.reset()
        return counting

    def reset(self) -> None:
        """Reset the counters."""
        self.messages = self.bytes = 0

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> MPI.Request:
        """Send as the base class does, and count the message."""
        self.messages += 1
        self.bytes += memoryview(buf[0]).nbytes
        return super().Isend(buf, dest, tag)


@dataclass(frozen=True)
class Case:
    """A field on a grid, and the width of its halo."""

    shape: tuple[int, ...]
    channels: int
    dtype: torch.dtype
    boundary: tuple[Rule, ...]
    width: int

    @property
    def name(self) -> str:
        """Points, channels, dtype, and the boundary rule."""
        size = "x".join(map(str, (*self.shape, self.channels)))
        kind = str(self.dtype).removeprefix("torch.float")
        return f"{size} f{kind} {', '.join(map(str, self.boundary))}"


CASES = (
    Case((512, 512), 2, torch.float64, ("periodic", "periodic"), 1),
    Case((512, 512), 16, torch.float32, ("periodic", "periodic"), 1),
    Case((512, 512), 16, torch.float32, ("replicate", "periodic"), 2),
    Case((128, 384), 8, torch.float32, ("zero", "reflect"), 1),
    Case((65, 97), 3, torch.float64, ("reflect", "periodic"), 3),
    Case((65, 97), 3, torch.float64, (1.5, "replicate"), 2),
    Case((100_000,), 4, torch.float64, ("periodic",), 2),
    Case((48, 64, 80), 4, torch.float32, ("periodic", "periodic", "periodic"), 1),
    Case((33, 40, 50), 2, torch.float64, ("periodic", "zero", "reflect"), 2),
)


@dataclass(frozen=True)
class Needs:
    """Needs of a rank: distinct points of other ranks, the ranks that own them, and the faces towards them."""

    points: int
    ranks: int
    faces: int


def needs(partition: GridPartition, rank: int, width: int) -> Needs:
    """Return the needs of `rank` for a halo of `width`, from the owned ranges of all ranks. Not collective."""
    shape, size = partition.shape, partition.comm.size
    owned = [partition.owned_slices(other)[: len(shape)] for other in range(size)]
    own = owned[rank]
    around = [
        _coordinates(rule, n, part.start - width, part.stop + width)
        for rule, n, part in zip(partition.boundary, shape, own, strict=True)
    ]
    needed = _marked(shape, around)
    needed[own] = False
    faces = 0
    for axis, (rule, n, part) in enumerate(zip(partition.boundary, shape, own, strict=True)):
        for beside in (part.start - 1, part.stop):
            layer: list[Any] = [np.arange(n)[other] for n, other in zip(shape, own, strict=True)]
            layer[axis] = _coordinates(rule, n, beside, beside + 1)
            marked = _marked(shape, layer)
            marked[own] = False
            faces += bool(marked.any())
    owners = sum(bool(needed[owned[other]].any()) for other in range(size) if other != rank)
    return Needs(int(needed.sum()), owners, faces)


def _coordinates(rule: Rule, n: int, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Return the points of an axis of `n` that supply the positions `start`, ..., `stop - 1` under `rule`."""
    places = np.arange(start, stop)
    if rule == "periodic":
        return places % n
    if rule == "replicate":
        return places.clip(0, n - 1)
    if rule == "reflect":
        places = np.abs(places)
        return np.where(places < n, places, 2 * (n - 1) - places)
    return places[(places >= 0) & (places < n)]


def _marked(shape: tuple[int, ...], coordinates: list[Any]) -> npt.NDArray[np.bool_]:
    marked = np.zeros(shape, dtype=bool)
    marked[np.ix_(*coordinates)] = True
    return marked


@dataclass(frozen=True)
class Traffic:
    """One exchange and its transpose: messages and bytes of all ranks, and the seconds of the slowest rank.

    `faces` is the number of faces of all ranks. `excess` is the largest surplus of a rank's messages over its own
    faces, in either direction. `least` is the number of bytes that all ranks need.
    """

    case: Case
    processes: tuple[int, ...]
    messages: int
    faces: int
    excess: int
    sent: int
    returned: int
    least: int
    seconds: float
    transposed_seconds: float

    def row(self) -> Row:
        """Return the row of the report."""
        ranks = math.prod(self.processes)
        return {
            "grid": self.case.name,
            "width": self.case.width,
            "ranks": "x".join(map(str, self.processes)),
            "messages": self.messages,
            "faces": self.faces,
            "bytes": self.sent,
            "bytes back": self.returned,
            "least": self.least,
            "us": 1e6 * self.seconds,
            "us back": 1e6 * self.transposed_seconds,
            "MB/s a rank": 1e-6 * self.sent / ranks / self.seconds,
        }

    def checks(self) -> list[Check]:
        """Check that every byte sent is needed, and that every message has a face."""
        name = f"{self.case.name}, width {self.case.width}"
        other = max(abs(self.sent - self.least), abs(self.returned - self.least))
        return [
            Check(f"bytes more or less than the least, {name}", float(other), 0.0),
            Check(f"messages of a rank over its faces, {name}", float(self.excess), 0.0),
        ]


def measure(comm: MPI.Intracomm, case: Case, repeats: int = REPEATS) -> Traffic:
    """Count and time one exchange and its transpose. Collective on `comm`."""
    partition = GridPartition(comm, case.shape, case.channels, case.boundary, case.width)
    # The partition passes its communicator to PETSc, which accepts only mpi4py's own types.
    partition.comm = counting = CountingComm(comm)
    x = torch.ones(partition.local_shape, dtype=case.dtype, requires_grad=True)
    padded = halo(x, partition)
    cotangent = torch.ones_like(padded)

    def exchange() -> None:
        with torch.no_grad():
            halo(x, partition)

    def transposed() -> None:
        torch.autograd.grad(padded, x, cotangent, retain_graph=True)

    need = needs(partition, comm.rank, case.width)
    there, back = _counted(counting, exchange), _counted(counting, transposed)
    forward, backward = (statistics.median(_seconds(comm, run, repeats)) for run in (exchange, transposed))
    return Traffic(
        case,
        partition.processes,
        messages=comm.allreduce(there[0]),
        faces=comm.allreduce(need.faces),
        excess=comm.allreduce(max(there[0], back[0]) - need.faces, MPI.MAX),
        sent=comm.allreduce(there[1]),
        returned=comm.allreduce(back[1]),
        least=comm.allreduce(case.channels * x.element_size() * need.points),
        seconds=forward,
        transposed_seconds=backward,
    )


def _counted(comm: CountingComm, exchange: Callable[[], None]) -> tuple[int, int]:
    comm.reset()
    exchange()
    return comm.messages, comm.bytes


def _seconds(comm: MPI.Intracomm, exchange: Callable[[], None], repeats: int) -> list[float]:
    """Return the slowest rank's seconds of each exchange, without the first few."""
    seconds = np.empty(repeats + _WARM_UP)
    for repeat in range(len(seconds)):
        comm.Barrier()
        began = time.perf_counter()
        exchange()
        seconds[repeat] = time.perf_counter() - began
    comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    return [float(value) for value in seconds[_WARM_UP:]]


def run() -> Report:
    """Measure on all ranks. Collective on the world."""
    comm = MPI.COMM_WORLD
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [measure(comm, case) for case in CASES]
    finally:
        torch.set_num_threads(threads)
    notes = (
        "Messages and bytes of all ranks in one exchange; back: in the transposed one. faces: those of blocks behind "
        "which another rank's points begin. least: distinct points in the halo that another rank owns, in bytes.",
        f"Microseconds of the slowest rank, median of {REPEATS}, 1 thread; packing and filling edges included.",
    )
    checks = [check for traffic in found for check in traffic.checks()]
    return Report("halo", [traffic.row() for traffic in found], checks, notes)
