"""slurm/requeue.sh queues a job again if its program asks for that, and not if the job was taken away from it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, ROOT
from tests.unit.launch_scripts import stand_in


def job(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    """What a batch script does whose program is a piece of shell; its scontrol ends it as Slurm would."""
    stand_in(tmp_path, "scontrol", "echo scontrol $*; kill -TERM $PPID")
    return subprocess.run(
        ["bash", "-euc", f'. "{ROOT}/slurm/requeue.sh"; run_and_requeue sh -c "$1"', "job", program],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("code", [0, 1, 137])
def test_the_program_s_exit_code_is_the_job_s(tmp_path: Path, code: int) -> None:
    done = job(tmp_path, f"exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_program_that_asks_for_it_is_queued_again(tmp_path: Path) -> None:
    done = job(tmp_path, "exit 75")
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "job 7 has stopped in time and is queued again (restart 1)\nscontrol requeue 7\n"


def test_a_job_that_is_taken_away_waits_for_its_program_and_stays_away(tmp_path: Path) -> None:
    # As Slurm tells the batch script, and its ranks by themselves.
    done = job(tmp_path, "kill -TERM $PPID; sleep 0.5; echo saved; exit 75")
    assert (done.returncode, done.stdout) == (75, "saved\n")
