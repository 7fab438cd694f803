"""Fourier transforms of a partitioned field, against torch's on the whole field and one core.

One thread per rank, float64. Ranks that take no part in a measurement sleep during it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mpi4py import MPI

from pnode_dist.bench.halo import CountingComm
from pnode_dist.bench.report import Check, Report, Row
from pnode_dist.bench.scaling import rank_counts
from pnode_dist.bench.some_ranks import on_first
from pnode_dist.exchange.fourier import fft2, rfft2
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.spectral import SpectralPartition

POINTS, CHANNELS, ROUNDS = 1024, 2, 5
LARGEST_ERROR = 1e-13
LONGEST_ON_ONE_RANK = 1.1
EFFICIENCY = 0.7
_AXES = (-3, -2)


@dataclass(frozen=True)
class Transform:
    """A transform `name` of one field on the first ranks, and torch's of the whole field."""

    name: str
    half: bool
    local: Callable[..., torch.Tensor]
    whole: Callable[..., torch.Tensor]


TRANSFORMS = (
    Transform("rfft2", True, rfft2, torch.fft.rfft2),
    Transform("fft2", False, fft2, torch.fft.fft2),
)


class OnRanks:
    """A transform of the field on the ranks of `comm`, in slabs along the first axis. Collective on `comm`."""

    def __init__(self, comm: MPI.Intracomm, transform: Transform, points: int) -> None:
        self.comm, self.transform = CountingComm(comm), transform
        grid = GridPartition(self.comm, (points, points), CHANNELS, processes=(comm.size, 1))
        self.spectrum = SpectralPartition(grid, transform.half)
        rows = slice(*grid.owned[0])
        self.field = field_of(transform, points)[rows].clone().requires_grad_()

    def seconds(self) -> float:
        """Return the seconds of a transform. Collective."""
        with torch.no_grad():
            self.comm.Barrier()
            began = time.perf_counter()
            self.transform.local(self.field, self.spectrum)
            return time.perf_counter() - began

    def gradient_seconds(self) -> float:
        """Return the seconds of a transform and its adjoint. Collective."""
        self.comm.Barrier()
        began = time.perf_counter()
        modes = self.transform.local(self.field, self.spectrum)
        torch.autograd.grad(modes, self.field, modes.detach())
        return time.perf_counter() - began

    def sent(self) -> tuple[int, int]:
        """Return the messages and bytes that this rank sends in a transform. Collective."""
        self.comm.reset()
        self.seconds()
        return self.comm.messages, self.comm.bytes

    def errors(self) -> tuple[float, float]:
        """Return the errors of values and of the adjoint, relative. Collective.

        Values are compared with torch's on the whole field, and <y, F x> with <F^T y, x>.
        """
        points = self.spectrum.grid.shape[0]
        modes = self.transform.local(self.field, self.spectrum)
        whole = self.transform.whole(field_of(self.transform, points), dim=_AXES)
        own = whole[self.spectrum.owned_slices(self.comm.rank)[:-1]]
        along = own.conj() + 1.0
        (pulled,) = torch.autograd.grad(modes, self.field, along)
        sums = torch.tensor(
            [
                float((modes - own).abs().square().sum().detach()),
                float(own.abs().square().sum()),
                _product(along, modes.detach()),
                _product(pulled, self.field.detach()),
                float((along.abs() * modes.detach().abs()).sum()),
            ],
            dtype=torch.float64,
        )
        self.comm.Allreduce(MPI.IN_PLACE, sums.numpy(), MPI.SUM)
        difference, size, forward, backward, scale = sums.tolist()
        return math.sqrt(difference / size), abs(forward - backward) / scale


def field_of(transform: Transform, points: int) -> torch.Tensor:
    """Return the whole field, real or complex, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    shape = (points, points, CHANNELS)
    dtype = torch.float64 if transform.half else torch.complex128
    return torch.randn(shape, dtype=dtype, generator=generator)


def _product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the inner product of two fields, with complex entries as pairs of real numbers."""
    return float((torch.view_as_real(a) * torch.view_as_real(b)).sum() if a.is_complex() else (a * b).sum())


def _torch_seconds(transform: Transform, field: torch.Tensor, gradient: bool) -> float:
    field = field.detach().requires_grad_(gradient)
    began = time.perf_counter()
    modes = transform.whole(field, dim=_AXES)
    if gradient:
        torch.autograd.grad(modes, field, modes.detach())
    return time.perf_counter() - began


def run() -> Report:
    """Measure on 1, 2, 4, ... and all ranks. Collective on the world."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measured(MPI.COMM_WORLD, POINTS, ROUNDS)
    finally:
        torch.set_num_threads(before)


def measured(comm: MPI.Intracomm, points: int, rounds: int) -> Report:
    """Return the report for a field of `points` x `points`. Collective on `comm`."""
    rows: list[Row] = []
    checks: list[Check] = []
    counts = rank_counts(comm.size)
    for transform in TRANSFORMS:
        found: dict[int, OnRanks] = {}
        for ranks in counts:
            subset = comm.Split(0 if comm.rank < ranks else MPI.UNDEFINED, comm.rank)
            if subset != MPI.COMM_NULL:
                assert isinstance(subset, MPI.Intracomm)
                found[ranks] = OnRanks(subset, transform, points)
        field = field_of(transform, points) if comm.rank == 0 else torch.empty(0)
        alone = [partial(_torch_seconds, transform, field, gradient) for gradient in (False, True)]
        tasks: dict[tuple[int, int], Callable[[], float]] = {(0, kind): work for kind, work in enumerate(alone)}
        for ranks in counts:
            if ranks in found:
                tasks[ranks, 0], tasks[ranks, 1] = found[ranks].seconds, found[ranks].gradient_seconds
        least = _least(comm, tasks, counts, rounds)
        rows.append(_row(transform.name, "torch, one core", 1, (least[0, 0], least[0, 1]), least, (0, 0)))
        for ranks in counts:
            called = f"{ranks} rank{'s' * (ranks > 1)}"
            messages = _on_first(comm, ranks, found, lambda one: one.sent()[0])
            sent = int(messages), int(_on_first(comm, ranks, found, lambda one: one.sent()[1]))
            rows.append(_row(transform.name, "slabs", ranks, (least[ranks, 0], least[ranks, 1]), least, sent))
            value = _on_first(comm, ranks, found, lambda one: one.errors()[0])
            adjoint = _on_first(comm, ranks, found, lambda one: one.errors()[1])
            checks.append(Check(f"{transform.name}, {called}: error of the dot product", adjoint, LARGEST_ERROR))
            checks.append(Check(f"{transform.name}, {called}: difference from torch", value, LARGEST_ERROR))
            over = least[ranks, 0] / least[0, 0]
            target = LONGEST_ON_ONE_RANK if ranks == 1 else 1 / (EFFICIENCY * ranks)
            checks.append(Check(f"{transform.name}, {called}: time over torch's on one core", over, target))
    notes = (
        f"Seconds of a transform of {points} x {points} points and {CHANNELS} channels, and with its adjoint; float64, "
        "one thread per rank, least of interleaved rounds, slowest rank.",
        "messages, MB: sent by the rank that sends most in a transform. A rank sends each other one message, with all "
        "but its own share of the spectrum.",
    )
    return Report("fft", rows, checks, notes)


def _on_first(comm: MPI.Intracomm, ranks: int, found: dict[int, OnRanks], measure: Callable[[OnRanks], Any]) -> float:
    """Return the largest result of `measure` on the first ranks, which hold the transform. Collective."""
    return on_first(comm, ranks, lambda: float(measure(found[ranks])))


def _least(
    comm: MPI.Intracomm, tasks: dict[tuple[int, int], Callable[[], float]], counts: list[int], rounds: int
) -> dict[tuple[int, int], float]:
    """Return the least seconds of all tasks over interleaved rounds, without the first one. Collective."""
    least: dict[tuple[int, int], float] = {}
    for turn in range(rounds + 1):
        for ranks in (0, *counts):
            for kind in (0, 1):
                seconds = on_first(comm, max(ranks, 1), partial(_run, tasks, (ranks, kind)))
                if turn:
                    least[ranks, kind] = min(least.get((ranks, kind), math.inf), seconds)
    return least


def _run(tasks: dict[tuple[int, int], Callable[[], float]], key: tuple[int, int]) -> float:
    """Run a task. Only the ranks that take part hold it."""
    return tasks[key]()


def _row(
    name: str,
    what: str,
    ranks: int,
    seconds: tuple[float, float],
    least: dict[tuple[int, int], float],
    sent: tuple[int, int],
) -> Row:
    return {
        "transform": name,
        "what": what,
        "ranks": ranks,
        "seconds": seconds[0],
        "with adjoint": seconds[1],
        "speed-up": least[0, 0] / seconds[0],
        "with its adjoint": least[0, 1] / seconds[1],
        "messages": sent[0],
        "MB": sent[1] / 1e6,
    }
