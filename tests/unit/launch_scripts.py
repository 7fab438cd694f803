"""Launch scripts beside programs that stand in for those of other machines."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.conftest import ROOT


def stand_in(directory: Path, name: str, body: str) -> None:
    """A program of this name, as a line of shell, which scripts that `run_copy` starts find first."""
    program = directory / name
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


def run_copy(directory: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run launch/`script` from a copy in `directory`, so without a .venv beside it, and with its programs first.

    What a launcher has told this process itself stays out of it.
    """
    launch = directory / "launch"
    launch.mkdir(exist_ok=True)
    for name in ("environment.sh", script):
        (launch / name).write_bytes((ROOT / "launch" / name).read_bytes())
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PMI_", "PMIX_", "MPI_LOCAL", "OMP_", "OPENBLAS_", "MKL_", "SLURM_", "UCX_"))
    }
    return subprocess.run(
        ["bash", str(launch / script), *arguments],
        env={**inherited, "PATH": f"{directory}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
