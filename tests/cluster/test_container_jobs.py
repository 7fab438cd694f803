"""launch/container.sh with a real engine: all ranks in one container, and a container for each rank."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import install
from tests.cluster.image import Image
from tests.cluster.slurm import Slurm, clean_environment
from tests.cluster.test_jobs import CONFIG, ONE_RANK_A_NODE, SLOWLY, settings
from tests.conftest import ROOT

pytestmark = pytest.mark.cluster

CONTAINER = str(ROOT / "launch" / "container.sh")


@pytest.fixture(scope="module", autouse=True)
def _charliecloud() -> None:
    install(("ch-run",), ("charliecloud",))


def test_ranks_see_each_other_in_one_container_and_in_one_each(image: Image, tmp_path: Path) -> None:
    doctor = ("pnode-dist", "doctor", "--json")
    inside = [CONTAINER, "--image", str(image.rootfs), "-n", "2", *doctor]
    one_each = [
        str(ROOT / "launch/mpirun.sh"),
        "-n",
        "2",
        CONTAINER,
        "--image",
        str(image.rootfs),
        "--per-rank",
        *doctor,
    ]
    for command in (inside, one_each):
        done = subprocess.run(
            command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=SLOWLY, check=False
        )
        assert done.returncode == 0, done.stderr
        findings = json.loads(done.stdout)
        assert (findings["mpi"]["ranks"], findings["problems"]) == (2, [])
        assert findings["petsc"]["directory"].startswith("/opt/pnode_dist/")


def test_a_job_trains_with_a_container_for_each_rank(image: Image, slurm: Slurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (CONFIG, *settings(**{"training.epochs": "1"}), "--run-dir", str(run))
    job = slurm.submit(
        "train_container.sbatch", *arguments, options=ONE_RANK_A_NODE, PNODE_DIST_IMAGE=str(image.rootfs)
    )
    slurm.wait_for(job, "COMPLETED", "FAILED", seconds=SLOWLY)
    assert slurm.about(job)["JobState"] == "COMPLETED", slurm.output(job)
    assert f"next: pnode-dist evaluate {run}" in slurm.output(job)
