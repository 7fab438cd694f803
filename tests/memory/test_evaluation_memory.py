"""The memory of an evaluation does not grow with the number of leads: on one rank and on two."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("evaluation_memory.py")
ENTRIES, FEW, MANY = 500_000, 4, 40
# Two forecasts of a lead in float64. All leads of one of the four forecasts are 40 times that.
ONE_LEAD = 2 * ENTRIES * 8 / 2**20
# Freed memory goes back to the system at once, so that the peak is that of the live tensors.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def peak(mpirun: Run, ranks: int, directory: Path, leads: int) -> float:
    """The growth in MiB of the fullest rank, in new processes."""
    command = ["python", str(PROGRAM), str(directory), str(leads), str(ENTRIES)]
    finished = mpirun(ranks, *command, timeout=600, **ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr
    line = next(line for line in finished.stdout.splitlines() if line.startswith("{"))
    return float(json.loads(line)["MiB"])


@pytest.mark.nightly
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_times_the_leads_take_less_memory_than_one_lead(mpirun: Run, tmp_path: Path, ranks: int) -> None:
    few, many = (peak(mpirun, ranks, tmp_path, leads) for leads in (FEW, MANY))
    # The two states of the first lead are there in any case, so that the measure cannot be empty.
    assert few > ONE_LEAD
    assert many - few < ONE_LEAD
