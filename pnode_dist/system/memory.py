"""The memory of its node that a rank may use, found without communication.

The limits of all control groups above a process apply to it. In a container the path of a group is often the host's,
and only the topmost directory is visible.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
GROUPS = Path("/proc/self/cgroup")
MOUNTED = Path("/sys/fs/cgroup")
# Version 1 of control groups says "no limit" by a number near 2^63.
_NO_LIMIT = 2**60
# How many ranks of the job the launcher started on this node: MPICH and Intel MPI, Open MPI, MVAPICH.
_LOCAL_SIZES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_SLURM_TASKS = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
_TASKS_OF_NODES = re.compile(r"(\d+)(?:\(x(\d+)\))?\Z")


@dataclass(frozen=True)
class _Files:
    """The file names of one version of control groups: the limit, the usage, and cache that can be freed."""

    limit: str
    used: str
    cached: tuple[str, ...]


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "inactive_file"))
_VERSION_2 = _Files("memory.max", "memory.current", ("inactive_file",))


def memory_limit(
    groups: Path = GROUPS, mounted: Path = MOUNTED, environment: Mapping[str, str] = os.environ
) -> int | None:
    """Return the job's memory limit on this node, from Slurm or control groups, in bytes; None: no limit."""
    limits = [limit for limit, _, _ in _limited_groups(groups, mounted)]
    return min([*limits, *_slurm_limits(environment)], default=None)


def available_memory(
    meminfo: Path = MEMINFO,
    groups: Path = GROUPS,
    mounted: Path = MOUNTED,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Return the memory in bytes that this node's part of the job can still allocate.

    This is the minimum of the system's available memory, of the remainder in every control group above this process
    (its page cache counts as free), and of Slurm's limits.
    """
    left = [_left_on_node(meminfo), *_slurm_limits(environment)]
    for limit, directory, files in _limited_groups(groups, mounted):
        used = _number(directory / files.used)
        if used is not None:
            left.append(limit - used + _page_cache(directory / "memory.stat", files.cached))
    return max(min(left), 0)


def ranks_on_node(environment: Mapping[str, str] = os.environ, fallback: int = 1) -> int:
    """Return the number of ranks of the job on this node, from the launcher; `fallback` if unknown."""
    for name in _LOCAL_SIZES:
        if (ranks := _positive(environment, name)) is not None:
            return ranks
    # Outside a step these describe the allocation, not the processes.
    if "SLURM_STEP_ID" in environment:
        for name in _SLURM_TASKS:
            if (ranks := _tasks_of_node(environment.get(name, ""), environment.get("SLURM_NODEID", "0"))) is not None:
                return ranks
    return _positive(environment, "LOCAL_WORLD_SIZE") or fallback


@cache
def default_ram(world_size: int) -> int:
    """Return the default budget of this rank for checkpoints and graphs, in bytes.

    It is half of the available memory, divided by the ranks on the node (all ranks, if that number is unknown). The
    other half is for memory outside the budget: the working set of a step, parameters, optimizer and data, the
    allocators' reserves, the page cache of spilled checkpoints, and other processes. Measured once per process, so that
    every solve plans with the same number.
    """
    return available_memory() // (2 * ranks_on_node(fallback=world_size))


def _left_on_node(meminfo: Path) -> int:
    with suppress(OSError):
        for line in meminfo.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _limited_groups(groups: Path, mounted: Path) -> Iterator[tuple[int, Path, _Files]]:
    """Yield the control groups that limit this process: the limit in bytes, the directory, its files."""
    try:
        memberships = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in memberships:
        if controllers == "":
            base, files = mounted, _VERSION_2
        elif "memory" in controllers.split(","):
            base, files = mounted / "memory", _VERSION_1
        else:
            continue
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            if not directory.is_relative_to(base):
                break
            limit = _number(directory / files.limit)
            if limit is not None and limit < _NO_LIMIT:
                yield limit, directory, files


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _page_cache(statistics: Path, names: tuple[str, ...]) -> int:
    """Return the first of `names` in a group's memory.stat, in bytes; 0 if there is none."""
    entries: dict[str, str] = {}
    with suppress(OSError, ValueError):
        entries = dict(line.split(None, 1) for line in statistics.read_text().splitlines())
    return next((int(entries[name]) for name in names if name in entries), 0)


def _slurm_limits(environment: Mapping[str, str]) -> list[int]:
    """Return Slurm's limits for the job on this node, in bytes. Slurm gives MiB, with 0 for all memory."""
    per_node = _positive(environment, "SLURM_MEM_PER_NODE")
    per_cpu = _positive(environment, "SLURM_MEM_PER_CPU")
    limits = [] if per_node is None else [per_node]
    if per_cpu is not None:
        limits.append(per_cpu * (_positive(environment, "SLURM_CPUS_ON_NODE") or 1))
    return [limit * 2**20 for limit in limits]


def _tasks_of_node(counts: str, node: str) -> int | None:
    """Return entry `node` of Slurm's "2(x3),1", which is 2, 2, 2, 1; None if there is none."""
    if not node.isdigit():
        return None
    before = int(node)
    for entry in counts.split(","):
        match = _TASKS_OF_NODES.match(entry)
        if match is None:
            return None
        nodes = int(match[2] or 1)
        if before < nodes:
            return int(match[1])
        before -= nodes
    return None


def _positive(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdigit() and int(text) > 0 else None
