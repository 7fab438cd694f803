"""launch/container.sh puts all ranks into one container, or each rank into one of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.launch_scripts import run_copy

RANK = {"PMI_RANK": "1", "PMI_SIZE": "4"}


def command(tmp_path: Path, *arguments: str, **environment: str) -> str:
    done = run_copy(tmp_path, "container.sh", "--dry-run", *arguments, **{"TMPDIR": "/scratch", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip()


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_all_ranks_share_one_container(tmp_path: Path, engine: str) -> None:
    said = command(tmp_path, "--engine", engine, "--image", "app:1", "-n", "2", "pnode-dist", "doctor")
    assert said.startswith(f"OMP_NUM_THREADS=1 {engine} run --rm --user {os.getuid()}:{os.getgid()} ")
    assert f"--workdir {os.getcwd()} --volume {os.getcwd()}:{os.getcwd()} --volume /scratch:/scratch" in said
    assert "--network" not in said
    assert said.endswith(" app:1 mpirun.sh -n 2 pnode-dist doctor")


def test_apptainer_and_charliecloud_are_known_by_their_images(tmp_path: Path) -> None:
    said = command(tmp_path, "--image", "app.sif", "-n", "2", "true")
    assert said.endswith(
        f"apptainer exec --bind {os.getcwd()} --bind /scratch --pwd {os.getcwd()} app.sif mpirun.sh -n 2 true"
    )
    said = command(tmp_path, "-n", "2", "true", PNODE_DIST_IMAGE=str(tmp_path))
    assert said.endswith(
        f"ch-run --set-env --bind {os.getcwd()} --bind /scratch --cd {os.getcwd()} {tmp_path} -- mpirun.sh -n 2 true"
    )


def test_a_container_for_each_rank_is_told_what_its_launcher_says(tmp_path: Path) -> None:
    said = command(tmp_path, "--engine", "podman", "--image", "app:1", "--per-rank", "true", PMI_FD="7", **RANK)
    assert "UCX_TLS=tcp,self podman run" in said.replace("\\,", ",")
    assert "--network host --ipc host --preserve-fds 1" in said
    for variable in ("PMI_RANK", "PMI_SIZE", "PMI_FD", "OMP_NUM_THREADS", "TMPDIR"):
        assert f" --env {variable} " in said
    assert said.endswith(" app:1 true")


def test_ranks_of_one_node_share_a_name_space_in_charliecloud(tmp_path: Path) -> None:
    as_if = {**RANK, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    assert "--join-ct=2 --join-tag=7.0." in command(tmp_path, "--image", str(tmp_path), "--per-rank", "true", **as_if)
    as_if["SLURM_STEP_TASKS_PER_NODE"] = "2,1"
    said = command(tmp_path, "--image", str(tmp_path), "--per-rank", "true", **as_if)
    assert "--join" not in said
    assert said.replace("\\", "").split()[1] == "UCX_TLS=^cma"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["-n", "2", "true"], {"PNODE_DIST_IMAGE": ""}, "--image: which image? (or set PNODE_DIST_IMAGE)"),
        (["--image"], {}, "--image needs a value"),
        (
            ["--image", "app:1"],
            {},
            "nothing to run: launch/container.sh --image IMAGE -n RANKS PROGRAM [ARGUMENT...]",
        ),
        (
            ["--engine", "lxc", "--image", "app:1", "true"],
            {},
            "--engine lxc: must be docker, podman, apptainer or charliecloud",
        ),
        (
            ["--image", "app:1", "--per-rank", "true"],
            {},
            "--per-rank: no launcher has started this as a rank: put launch/srun.sh or launch/mpirun.sh before it",
        ),
        (
            ["--engine", "docker", "--image", "app:1", "--per-rank", "true"],
            {**RANK, "PMI_FD": "7"},
            "docker hands no open connection on, which PMI needs here: use podman, apptainer, charliecloud or "
            "mpiexec -pmi-port",
        ),
    ],
)
def test_wrong_usage_gets_one_line(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    done = run_copy(tmp_path, "container.sh", "--dry-run", *arguments, **environment)
    assert (done.returncode, done.stderr) == (2, f"container.sh: {message}\n")
