"""The command of slurm/serve.sbatch: by itself, in an array, and for UM-Bridge's load balancer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pnode_dist.cli.main import parser
from tests.conftest import ROOT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose srun.sh prints its arguments."""
    for name in ("slurm", "launch"):
        (tmp_path / name).mkdir()
    (tmp_path / "slurm" / "site.sh").touch()
    program = tmp_path / "launch" / "srun.sh"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return tmp_path


def run(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    slurm = {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_ID": "12"}
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / "serve.sbatch"), *arguments],
        env={"PATH": os.environ["PATH"], **slurm, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def started(project: Path, *arguments: str, **environment: str) -> list[str]:
    """The arguments of the service, which its parser takes."""
    done = run(project, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()
    assert command[:2] == ["pnode-dist", "serve"]
    parser().parse_args(command[1:])
    return command[2:]


def test_the_job_chooses_a_port_and_writes_its_url_where_the_balancer_looks(project: Path) -> None:
    balancer = {"UMBRIDGE_LOADBALANCER_COMM_FILEDIR": str(project / "comm")}
    url = ["--url-file", f"{project}/comm/url-12.txt"]
    expected = ["runs/my", "--host", "0.0.0.0", "--port", "0", "--insecure", *url]
    assert started(project, "runs/my", **balancer) == expected
    assert started(project, PNODE_DIST_SERVED="runs/my", **balancer) == expected
    assert (project / "comm").is_dir()
    array = {"SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3"}
    assert started(project, "runs/my", **balancer, **array)[-1] == f"{project}/comm/url-11_3.txt"


@pytest.mark.parametrize("option", [["--token-file", "secret"], ["--token-file=secret"]])
def test_a_token_replaces_insecure(project: Path, option: list[str]) -> None:
    found = started(project, "runs/my", "--set", "solver.step_size=1", *option)
    assert "--insecure" not in found
    assert found[-len(option) :] == option
    assert found[found.index("--url-file") + 1] == f"{project}/url-12.txt"


def test_a_job_without_a_run_ends_with_one_line(project: Path) -> None:
    done = run(project)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "serve.sbatch: which RUN_DIR or CONFIG?\n")
