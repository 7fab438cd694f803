"""The launch scripts set threads and binding, and give back the program's outcome."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]
FAKE_VERSIONS = {
    "mpich": "HYDRA build details:",
    "openmpi": "mpiexec (Open MPI) 5.0.3",
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.12",
}


def mpirun_command(tmp_path: Path, flavour: str, *arguments: str, **environment: str) -> str:
    """What mpirun.sh would run with an mpiexec of another flavour on the PATH."""
    launch = tmp_path / "launch"
    launch.mkdir(exist_ok=True)
    script = launch / "mpirun.sh"
    script.write_text((ROOT / "launch" / "mpirun.sh").read_text())
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text(f"#!/bin/sh\necho '{FAKE_VERSIONS[flavour]}'\n")
    mpiexec.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script), "--dry-run", *arguments],
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_every_rank_gets_one_thread_unless_told_otherwise(mpirun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    show = ("sh", "-c", "echo $OMP_NUM_THREADS $OPENBLAS_NUM_THREADS $MKL_NUM_THREADS")
    assert mpirun(2, *show).stdout.split("\n")[:2] == ["1 1 1", "1 1 1"]
    assert mpirun(1, *show, OMP_NUM_THREADS="2").stdout.split() == ["2", "2", "2"]


def test_mpich_binds_ranks_to_cores_of_their_own_where_there_are_enough(tmp_path: Path) -> None:
    assert "mpiexec -bind-to core:1 -n 1 true" in mpirun_command(tmp_path, "mpich", "-n", "1", "true")
    assert "-bind-to" not in mpirun_command(tmp_path, "mpich", "-n", "1000", "true")
    chosen = mpirun_command(tmp_path, "mpich", "-bind-to", "none", "-n", "1", "true")
    assert chosen.count("-bind-to") == 1


def test_open_mpi_may_run_as_root_and_oversubscribe(tmp_path: Path) -> None:
    few = mpirun_command(tmp_path, "openmpi", "-n", "1", "true")
    many = mpirun_command(tmp_path, "openmpi", "-n", "1000", "true")
    assert ("--allow-run-as-root" in few) == (os.getuid() == 0)
    assert "--bind-to core" in few
    assert "--bind-to none --oversubscribe" in many


def test_intel_mpi_is_left_to_pin_by_itself(tmp_path: Path) -> None:
    assert "mpiexec -n 2 true" in mpirun_command(tmp_path, "intel", "-n", "2", "true")


def test_the_programs_own_arguments_pass_through_untouched(tmp_path: Path) -> None:
    command = mpirun_command(tmp_path, "mpich", "-n", "1", "echo", "-n", "zero", "a b")
    assert command.rstrip().endswith("echo -n zero a\\ b")


def test_a_failing_rank_makes_the_launch_fail(mpirun: Run) -> None:
    assert mpirun(2, "sh", "-c", "exit 7").returncode == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0", "true"], "mpirun.sh: -n 0: must be a number of ranks, 1 or more"),
        (["-n", "two", "true"], "mpirun.sh: -n two: must be a number of ranks, 1 or more"),
        ([], "mpirun.sh: nothing to run: launch/mpirun.sh -n RANKS PROGRAM [ARGUMENT...]"),
    ],
)
def test_wrong_usage_gets_one_line(arguments: list[str], message: str) -> None:
    done = subprocess.run([str(ROOT / "launch/mpirun.sh"), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (2, message)


def test_sigterm_to_the_launcher_ends_all_ranks(tmp_path: Path) -> None:
    program = "echo $$ > $1/pid.$$; exec sleep 60"
    launcher = subprocess.Popen([str(ROOT / "launch/mpirun.sh"), "-n", "2", "sh", "-c", program, "sh", str(tmp_path)])
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("pid.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [int(path.suffix[1:]) for path in tmp_path.glob("pid.*")]
    assert len(ranks) == 2
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=20) != 0
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < deadline + 20:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_bootstrap_refuses_what_it_does_not_know() -> None:
    for arguments, message in [
        (["--frobnicate"], "unknown argument '--frobnicate'"),
        (["--python"], "--python needs an interpreter"),
        (["--python", "/bin/false"], "'/bin/false' is not Python 3.11 or newer"),
    ]:
        done = subprocess.run(
            [str(ROOT / "launch/bootstrap.sh"), *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert message in done.stderr
