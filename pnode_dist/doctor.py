"""`pnode-dist doctor`: what is installed, whether the ranks see each other, and how fast the scratch directory is."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import petsc4py
import torch
from mpi4py import MPI
from petsc4py import PETSc
from rich.console import Console
from rich.table import Table

import pnode_dist
from pnode_dist.compatibility import mpi_problem, scalar_problem
from pnode_dist.trajectory.budget import Trajectory, format_size

PACKAGES = ("torch", "petsc4py", "mpi4py", "h5py", "numpy", "checkpoint-schedules", "pydantic", "xarray", "matplotlib")
_SCRATCH_BYTES = 64 * 2**20
# How many tasks the launcher says it started, by launcher.
_TASK_COUNTS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class RankFacts:
    """What one rank says of itself. Speeds in bytes per second, memory in bytes (None: no limit was found)."""

    rank: int
    host: str
    pid: int
    cpus: list[int]
    torch_threads: int
    omp_num_threads: str | None
    memory_limit: int | None
    launched_tasks: int
    scratch: str
    scratch_first_write: float | None
    scratch_rewrite: float | None
    scratch_read: float | None
    problem: str | None


def run_doctor(as_json: bool) -> int:
    """Print the findings on rank 0. Collective on the MPI world; returns 0 if nothing is wrong and 1 otherwise."""
    comm = MPI.COMM_WORLD
    facts = comm.allgather(_facts_of(comm))
    ring = ring_problem(comm)
    problems = find_problems(facts, comm.size, ring)
    if comm.rank == 0:
        findings = {
            "versions": versions(),
            "mpi": {"library": _mpi_library(), "ranks": comm.size},
            "petsc": petsc_build(),
            "ranks": [asdict(rank) for rank in facts],
            "problems": problems,
        }
        if as_json:
            print(json.dumps(findings), flush=True)
        else:
            _show(findings, facts)
        for problem in problems:
            print(f"pnode-dist doctor: {problem}", file=sys.stderr, flush=True)
    return 1 if problems else 0


def versions() -> dict[str, str | None]:
    """The versions of Python, of the package and of what it stands on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "pnode_dist": pnode_dist.__version__}
    found["petsc"] = ".".join(map(str, PETSc.Sys.getVersion()))
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def petsc_build() -> dict[str, Any]:
    """PETSc's types and how it was configured."""
    configured = ""
    directory = petsc4py.get_config().get("PETSC_DIR", "")
    arch = petsc4py.get_config().get("PETSC_ARCH", "")
    header = Path(directory) / arch / "include" / "petscconfiginfo.h"
    if header.is_file():
        text = header.read_text(errors="replace")
        configured = text.partition('"')[2].rpartition('"')[0]
    return {
        "scalar": str(PETSc.ScalarType().dtype),
        "integer": str(PETSc.IntType().dtype),
        "directory": directory,
        "configure_options": configured,
    }


def memory_limit() -> int | None:
    """The memory this rank's job may use, from Slurm or the control group, in bytes; None if there is no limit."""
    limits = []
    if os.environ.get("SLURM_MEM_PER_NODE", "").isdigit():
        limits.append(int(os.environ["SLURM_MEM_PER_NODE"]) * 2**20)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        # Version 1 of control groups says "no limit" by a number near 2^63.
        if text.isdigit() and int(text) < 2**60:
            limits.append(int(text))
    return min(limits, default=None)


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
    maps = Path("/proc/self/maps")
    stack = scalar_problem(str(PETSc.ScalarType().dtype))
    stack = stack or (mpi_problem(maps.read_text().splitlines()) if maps.exists() else None)
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return RankFacts(
        rank=comm.rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        cpus=sorted(affinity),
        torch_threads=torch.get_num_threads(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        memory_limit=memory_limit(),
        launched_tasks=max((int(os.environ[n]) for n in _TASK_COUNTS if os.environ.get(n, "").isdigit()), default=1),
        scratch=str(scratch),
        scratch_first_write=first,
        scratch_rewrite=again,
        scratch_read=read,
        problem=stack or problem,
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


def find_problems(facts: list[RankFacts], ranks: int, ring: str | None) -> list[str]:
    """What is wrong, one line each."""
    problems = [] if ring is None else [ring]
    problems += [f"rank {rank.rank} on {rank.host}: {rank.problem}" for rank in facts if rank.problem]
    started = max(rank.launched_tasks for rank in facts)
    if ranks == 1 and started > 1:
        problems.append(
            f"the launcher started {started} tasks but MPI connects only 1: with srun add --mpi=pmi2 or the PMI that "
            "your MPI speaks, and use the mpiexec of the same MPI"
        )
    for host in sorted({rank.host for rank in facts}):
        here = [rank for rank in facts if rank.host == host]
        cores = len({cpu for rank in here for cpu in rank.cpus})
        threads = sum(rank.torch_threads for rank in here)
        if len(here) > 1 and threads > max(cores, len(here)):
            problems.append(f"{host}: {threads} torch threads on {cores} cores: set OMP_NUM_THREADS=1")
    return problems


def _mpi_library() -> str:
    return " ".join(MPI.Get_library_version().splitlines()[0].strip("\0").split())


def _show(findings: dict[str, Any], facts: list[RankFacts]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    software = Table("what", "version", title="software")
    for name, version in findings["versions"].items():
        software.add_row(name, version or "not installed")
    software.add_row("MPI", findings["mpi"]["library"])
    for name in ("scalar", "integer", "configure_options"):
        software.add_row(f"PETSc {name.replace('_', ' ')}", findings["petsc"][name])
    console.print(software)
    ranks = Table(
        "rank", "host", "cpus", "threads", "memory limit", "scratch", "write", "rewrite", "read", title="ranks"
    )
    for rank in facts:
        speeds = (rank.scratch_first_write, rank.scratch_rewrite, rank.scratch_read)
        ranks.add_row(
            str(rank.rank),
            rank.host,
            ",".join(map(str, rank.cpus)),
            str(rank.torch_threads),
            "none" if rank.memory_limit is None else format_size(rank.memory_limit),
            rank.scratch,
            *("-" if speed is None else f"{format_size(speed)}/s" for speed in speeds),
        )
    console.print(ranks)
    if not findings["problems"]:
        seen = "1 rank" if len(facts) == 1 else f"{len(facts)} ranks, which see each other"
        console.print(f"{seen}; nothing is wrong")
