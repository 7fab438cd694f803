"""Fixtures for all tests. The same code runs on one rank and, where marked mpi, on several."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pnode_dist import Mesh

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """All ranks as one state."""
    with Mesh() as mesh:
        yield mesh


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations without their pictures, which take longer than the rest of them and have tests of their own."""
    for problem in ("field", "flows", "gray_scott", "images", "pendulum", "robertson", "semilinear"):
        monkeypatch.setattr(f"pnode_dist.problems.{problem}.draw", lambda path, *_: str(path))


@pytest.fixture
def mpirun(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program on several ranks through launch/mpirun.sh: `mpirun(2, "python", "script.py", timeout=60)`."""

    def run(ranks: int, *command: str, timeout: float = 100, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(ROOT / "launch" / "mpirun.sh"), "-n", str(ranks), *command],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
