"""The doctor finds what is wrong, and says so in its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mpi4py import MPI

from pnode_dist.cli import doctor

Run = Callable[..., subprocess.CompletedProcess[str]]

HEALTHY = doctor.RankFacts(
    rank=0,
    host="node1",
    pid=1,
    cpus=[0],
    torch_threads=1,
    omp_num_threads="1",
    memory_limit=None,
    scratch="/scratch",
    scratch_first_write=1.0,
    scratch_rewrite=1.0,
    scratch_read=1.0,
    problem=None,
)


def test_healthy_ranks_have_no_problems() -> None:
    assert doctor.find_problems([HEALTHY, replace(HEALTHY, rank=1, cpus=[1])], ring=None) == []


def test_more_threads_than_cores_are_noticed() -> None:
    facts = [replace(HEALTHY, rank=rank, cpus=[0, 1], torch_threads=2) for rank in range(2)]
    assert doctor.find_problems(facts, ring=None) == ["node1: 4 torch threads on 2 cores: set OMP_NUM_THREADS=1"]


def test_a_rank_with_a_problem_is_named_with_its_host() -> None:
    (problem,) = doctor.find_problems([replace(HEALTHY, problem="no scratch")], ring=None)
    assert problem == "rank 0 on node1: no scratch"


def test_scratch_speeds_are_measured_and_nothing_is_left_behind(tmp_path: Path) -> None:
    assert all(speed > 0 for speed in doctor.scratch_speed(tmp_path, size=2**16))
    assert list(tmp_path.iterdir()) == []


def test_cpus_are_shown_as_ranges() -> None:
    assert [doctor.ranges(cpus) for cpus in ([], [3], [0, 1, 2, 5, 7, 8])] == ["", "3", "0-2,5,7-8"]


def test_the_json_is_one_object_about_every_rank(mpirun: Run) -> None:
    done = mpirun(2, "pnode-dist", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    assert findings["mpi"]["ranks"] == 2
    assert [rank["rank"] for rank in findings["ranks"]] == [0, 1]
    assert findings["petsc"]["scalar"] == "float64"
    assert findings["versions"]["petsc4py"]
    assert findings["problems"] == []


def test_of_ranks_that_mpi_does_not_connect_only_the_launchers_first_one_speaks(tmp_path: Path) -> None:
    def run(rank: str) -> subprocess.CompletedProcess[str]:
        as_if = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": rank}
        return subprocess.run(
            [sys.executable, "-m", "pnode_dist.cli.main", "doctor", "--json"],
            cwd=tmp_path,
            env={**os.environ, **as_if},
            capture_output=True,
            text=True,
            check=False,
        )

    first, second = run("0"), run("1")
    assert (first.returncode, second.returncode, second.stdout, second.stderr) == (1, 1, "", "")
    (problem,) = json.loads(first.stdout)["problems"]
    assert problem in first.stderr
    assert f"srun started 2 tasks but {MPI.get_vendor()[0]} connects only 1: start with launch/srun.sh" in problem


def test_an_unusable_scratch_directory_fails_the_check(mpirun: Run, tmp_path: Path) -> None:
    # Set behind the launcher: Open MPI's makes the directory of its own files.
    done = mpirun(1, "env", f"SLURM_TMPDIR={tmp_path / 'nowhere'}", "pnode-dist", "doctor")
    assert done.returncode == 1
    assert "nowhere cannot be used" in done.stderr
