"""What a rank may use of its node, with the files and variables of machines that are not at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pnode_dist.system import memory
from pnode_dist.system.memory import available_memory, memory_limit, ranks_on_node

NODE = 10_000 * 1024
Describe = Callable[[str, dict[str, str]], tuple[Path, Path, Path]]


@pytest.fixture
def describe(tmp_path: Path) -> Describe:
    """Make a meminfo of 10000 KiB available, a list of memberships and the files of control groups."""

    def make(memberships: str, files: dict[str, str]) -> tuple[Path, Path, Path]:
        meminfo, groups, mounted = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "mounted"
        meminfo.write_text("MemTotal:       20000 kB\nMemFree:         5000 kB\nMemAvailable:   10000 kB\n")
        groups.write_text(f"{memberships}\n")
        for name, text in files.items():
            path = mounted / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return meminfo, groups, mounted

    return make


@pytest.mark.parametrize(
    ("membership", "limits", "limit"),
    [
        ("0::/job/step", {"job/memory.max": "1000", "job/step/memory.max": "max"}, 1000),
        ("0::/job/step", {"job/memory.max": "1000", "job/step/memory.max": "600"}, 600),
        ("0::/of/the/host", {"memory.max": "700"}, 700),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "800"}, 800),
        ("4:hugetlb,memory:/job", {"memory/job/memory.limit_in_bytes": "800"}, 800),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("3:cpuset:/job", {"memory/job/memory.limit_in_bytes": "800"}, None),
    ],
)
def test_the_memory_limit_is_the_least_of_all_groups_above(
    describe: Describe, membership: str, limits: dict[str, str], limit: int | None
) -> None:
    _, groups, mounted = describe(membership, limits)
    assert memory_limit(groups, mounted, {}) == limit


@pytest.mark.parametrize(
    ("environment", "limit"),
    [
        ({"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "4"}, 400 * 2**20),
        ({"SLURM_MEM_PER_NODE": "300"}, 300 * 2**20),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({}, None),
    ],
)
def test_slurms_memory_limit_counts(tmp_path: Path, environment: dict[str, str], limit: int | None) -> None:
    assert memory_limit(tmp_path / "nothing", tmp_path, environment) == limit


def test_without_limits_what_the_system_has_left_is_available(describe: Describe) -> None:
    assert available_memory(*describe("0::/", {}), {}) == NODE


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        (
            "0::/job",
            {
                "job/memory.max": "1000",
                "job/memory.current": "700",
                "job/memory.stat": "anon 500\ninactive_file 150\nactive_file 50",
            },
            450,
        ),
        (
            "4:memory:/job",
            {
                "memory/job/memory.limit_in_bytes": "1000",
                "memory/job/memory.usage_in_bytes": "700",
                "memory/job/memory.stat": "cache 1\ninactive_file 20\ntotal_inactive_file 100",
            },
            400,
        ),
        ("0::/job", {"job/memory.max": "1000", "job/memory.current": "700"}, 300),
        ("0::/job", {"job/memory.max": "1000", "job/memory.current": "1100"}, 0),
        ("0::/job", {"job/memory.max": "max", "job/memory.current": "700"}, NODE),
        ("0::/job\n4:memory:/job", {"memory/job/memory.limit_in_bytes": str(2 * NODE)}, NODE),
        (
            "0::/job/step",
            {
                "job/memory.max": "1000",
                "job/memory.current": "900",
                "job/step/memory.max": "600",
                "job/step/memory.current": "100",
            },
            100,
        ),
    ],
)
def test_a_group_leaves_its_limit_less_what_is_used_and_not_page_cache(
    describe: Describe, membership: str, files: dict[str, str], left: int
) -> None:
    assert available_memory(*describe(membership, files), {}) == left


def test_slurms_limits_bound_what_is_available(describe: Describe) -> None:
    paths = describe("0::/", {})
    assert available_memory(*paths, {"SLURM_MEM_PER_NODE": "3"}) == 3 * 2**20
    assert available_memory(*paths, {"SLURM_MEM_PER_CPU": "2", "SLURM_CPUS_ON_NODE": "4"}) == 8 * 2**20
    assert available_memory(*paths, {"SLURM_MEM_PER_NODE": "3000"}) == NODE


def test_where_there_is_no_proc_the_system_is_asked_for_its_pages(tmp_path: Path) -> None:
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    nowhere = tmp_path / "nothing"
    assert 0 < available_memory(nowhere, nowhere, nowhere, {}) <= everything


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, 5),
        ({"MPI_LOCALNRANKS": "3"}, 3),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, 3),
        ({"MV2_COMM_WORLD_LOCAL_SIZE": "3"}, 3),
        ({"LOCAL_WORLD_SIZE": "3"}, 3),
        ({"MPI_LOCALNRANKS": "unknown"}, 5),
        ({"SLURM_STEP_ID": "0", "SLURM_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}, 2),
        ({"SLURM_STEP_ID": "0", "SLURM_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, 1),
        ({"SLURM_STEP_ID": "0", "SLURM_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "4"}, 5),
        ({"SLURM_STEP_ID": "0", "SLURM_TASKS_PER_NODE": "nonsense", "SLURM_NODEID": "0"}, 5),
        ({"SLURM_STEP_ID": "0", "SLURM_TASKS_PER_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "4"}, 4),
        ({"SLURM_TASKS_PER_NODE": "16"}, 5),
        # mpiexec starts one task of Slurm's per node, which starts the ranks.
        ({"SLURM_STEP_ID": "0", "SLURM_TASKS_PER_NODE": "1", "SLURM_NODEID": "0", "MPI_LOCALNRANKS": "6"}, 6),
    ],
)
def test_the_launcher_tells_how_many_ranks_share_the_node(environment: dict[str, str], ranks: int) -> None:
    assert ranks_on_node(environment, fallback=5) == ranks


def test_the_default_budget_is_half_of_the_memory_left_shared_by_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = iter([8000, 6000])
    monkeypatch.setattr(memory, "available_memory", lambda: next(left))
    monkeypatch.setattr(memory, "ranks_on_node", lambda fallback: fallback)
    memory.default_ram.cache_clear()
    try:
        assert [memory.default_ram(4) for _ in range(3)] == [1000] * 3
    finally:
        memory.default_ram.cache_clear()
