"""Exchanges of fields on another device than the memory that MPI reads, between three ranks.

In processes of their own: torch takes no further device after its first backward pass.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.oracles.other_device import needs_other_device

SCRIPT = Path(__file__).parents[2] / "oracles" / "exchanges_elsewhere.py"


@needs_other_device
def test_exchanges_and_their_transposes_there_are_those_of_the_cpu(
    mpirun: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    run = mpirun(3, "python", str(SCRIPT))
    assert run.returncode == 0, run.stderr
    names = ["global_sum", "gather_vector", "reduce_vector", "halo", "periodic", "redistribute", "with_ghosts"]
    assert run.stdout.split() == names
