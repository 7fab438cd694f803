"""Worker processes of torch's DataLoader inside an MPI job, by every way to start them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiers import at_night

PROGRAM = Path(__file__).with_name("data_loader_program.py")
EXPECTED = [number**2 * 0.75**4 for number in range(6)]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("start_method", at_night(["spawn", "forkserver"], but=["forkserver"]))
@pytest.mark.parametrize("ranks", at_night([1, 2], but=[2]))
def test_workers_load_and_solve_inside_an_mpi_job(
    mpirun: Callable[..., subprocess.CompletedProcess[str]], ranks: int, start_method: str
) -> None:
    finished = mpirun(ranks, "python", str(PROGRAM), start_method, timeout=250)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout) == [EXPECTED] * ranks
