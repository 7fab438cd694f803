"""`pnode-dist doctor`: what is installed, whether the ranks see each other, and how fast the scratch directory is."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import petsc4py
import torch
from mpi4py import MPI
from rich.console import Console
from rich.table import Table

from pnode_dist.checkpointing.budget import Trajectory
from pnode_dist.distributed.launcher import launched_rank, singleton_problem
from pnode_dist.system.compatibility import check_mpi, petsc4py_version, petsc_header
from pnode_dist.system.memory import memory_limit
from pnode_dist.system.sizes import format_size

PACKAGES = (
    "torch",
    "mpi4py",
    "h5py",
    "isal",
    "numpy",
    "pydantic",
    "xarray",
    "matplotlib",
)
_SCRATCH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class RankFacts:
    """The facts about one rank. Speeds in bytes per second, memory in bytes (None: no limit was found)."""

    rank: int
    host: str
    pid: int
    cpus: list[int]
    torch_threads: int
    omp_num_threads: str | None
    memory_limit: int | None
    scratch: str
    scratch_first_write: float | None
    scratch_rewrite: float | None
    scratch_read: float | None
    problem: str | None


def run_doctor(as_json: bool, emit: Callable[[dict[str, Any]], None] | None = None) -> int:
    """Print the findings on rank 0. Collective on the MPI world; returns 0 if nothing is wrong and 1 otherwise.

    With `as_json` they go to `emit`, by default as one line to standard output, instead of into tables.
    """
    comm = MPI.COMM_WORLD
    facts = comm.allgather(_facts_of(comm))
    ring = ring_problem(comm)
    problems = find_problems(facts, ring)
    # Where MPI does not connect the processes, each is its own rank 0; the launcher's first one speaks.
    if comm.rank == 0 and (comm.size > 1 or launched_rank() == 0):
        findings = {
            "versions": versions(),
            "mpi": {"library": _mpi_library(), "vendor": MPI.get_vendor()[0], "ranks": comm.size},
            "petsc": petsc_build(),
            "ranks": [asdict(rank) for rank in facts],
            "problems": problems,
        }
        if as_json:
            (emit or _print_json)(findings)
        else:
            _show(findings, facts)
        for problem in problems:
            print(f"pnode-dist doctor: {problem}", file=sys.stderr, flush=True)
    return 1 if problems else 0


def versions() -> dict[str, str | None]:
    """The versions of Python, of the package and of what it stands on; None for what is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "pnode_dist": importlib.metadata.version("pnode-dist"),
    }
    found["petsc"] = None
    with contextlib.suppress(ImportError):
        from petsc4py import PETSc

        found["petsc"] = ".".join(map(str, PETSc.Sys.getVersion()))
    found["petsc4py"] = petsc4py_version()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def petsc_build() -> dict[str, Any]:
    """PETSc's types and how it was configured; empty if it cannot be loaded."""
    try:
        from petsc4py import PETSc
    except ImportError:
        return {}
    configured = ""
    header = petsc_header("petscconfiginfo.h")
    if header is not None:
        text = header.read_text(errors="replace")
        configured = text.partition('"')[2].rpartition('"')[0]
    return {
        "scalar": str(PETSc.ScalarType().dtype),
        "integer": str(PETSc.IntType().dtype),
        # A binary wheel names no directory.
        "directory": petsc4py.get_config()["PETSC_DIR"] or str(Path(petsc4py.__file__).parent),
        "configure_options": configured,
    }


def scratch_speed(directory: Path, size: int = _SCRATCH_BYTES) -> tuple[float, float, float]:
    """Bytes per second of writing `size` bytes by HDF5 for the first time, of rewriting them, and of reading them."""
    data = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
    times = []
    with (
        tempfile.TemporaryDirectory(prefix="pnode-dist-doctor-", dir=directory) as folder,
        h5py.File(Path(folder) / "speed.h5", "w", libver="latest", locking=False) as file,
    ):
        dataset = file.create_dataset("slot", shape=data.shape, dtype=data.dtype)
        for work in (dataset.write_direct, dataset.write_direct, dataset.read_direct):
            started = time.perf_counter()
            work(data)
            times.append(time.perf_counter() - started)
    first, again, read = (size / max(seconds, 1e-9) for seconds in times)
    return first, again, read


def _facts_of(comm: MPI.Comm) -> RankFacts:
    scratch = Trajectory().scratch
    problem = None
    first = again = read = None
    try:
        first, again, read = scratch_speed(scratch)
    except OSError as error:
        problem = f"the scratch directory {scratch} cannot be used: {error.strerror or error}"
    if comm.size == 1:
        problem = singleton_problem(MPI.get_vendor()[0]) or problem
    try:
        check_mpi()
    except ImportError as error:
        problem = str(error)
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return RankFacts(
        rank=comm.rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        cpus=sorted(affinity),
        torch_threads=torch.get_num_threads(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        memory_limit=memory_limit(),
        scratch=str(scratch),
        scratch_first_write=first,
        scratch_rewrite=again,
        scratch_read=read,
        problem=problem,
    )


def ring_problem(comm: MPI.Comm) -> str | None:
    """Pass a token around all ranks and sum their numbers: what went wrong, None if nothing. Collective on `comm`."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    received = comm.sendrecv(comm.rank, dest=right, source=left)
    total = comm.allreduce(comm.rank)
    good = received == left and total == comm.size * (comm.size - 1) // 2
    if comm.allreduce(good, MPI.LAND):
        return None
    return "messages between the ranks arrive wrong"


def find_problems(facts: list[RankFacts], ring: str | None) -> list[str]:
    """Return the faults, one line each."""
    problems = [] if ring is None else [ring]
    problems += [f"rank {rank.rank} on {rank.host}: {rank.problem}" for rank in facts if rank.problem]
    for host in sorted({rank.host for rank in facts}):
        here = [rank for rank in facts if rank.host == host]
        cores = len({cpu for rank in here for cpu in rank.cpus})
        threads = sum(rank.torch_threads for rank in here)
        if len(here) > 1 and threads > max(cores, len(here)):
            problems.append(f"{host}: {threads} torch threads on {cores} cores: set OMP_NUM_THREADS=1")
    return problems


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers for people: `ranges([0, 1, 2, 5]) == "0-2,5"`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _print_json(findings: dict[str, Any]) -> None:
    print(json.dumps(findings), flush=True)


def _mpi_library() -> str:
    return " ".join(MPI.Get_library_version().splitlines()[0].strip("\0").split())


def _show(findings: dict[str, Any], facts: list[RankFacts]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    software = Table("what", "version", title="software")
    for name, version in findings["versions"].items():
        software.add_row(name, version or "not installed")
    software.add_row("MPI", findings["mpi"]["library"])
    for name, entry in findings["petsc"].items():
        software.add_row(f"PETSc {name.replace('_', ' ')}", entry)
    console.print(software)
    ranks = Table(
        "rank", "host", "cpus", "threads", "memory limit", "scratch", "write", "rewrite", "read", title="ranks"
    )
    for rank in facts:
        speeds = (rank.scratch_first_write, rank.scratch_rewrite, rank.scratch_read)
        ranks.add_row(
            str(rank.rank),
            rank.host,
            ranges(rank.cpus),
            f"{rank.torch_threads} torch, {rank.omp_num_threads or 'no limit for'} OpenMP",
            "none" if rank.memory_limit is None else format_size(rank.memory_limit),
            rank.scratch,
            *("-" if speed is None else f"{format_size(speed)}/s" for speed in speeds),
        )
    console.print(ranks)
    if not findings["problems"]:
        seen = "1 rank" if len(facts) == 1 else f"{len(facts)} ranks, which see each other"
        console.print(f"{seen}; nothing is wrong")
