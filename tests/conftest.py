"""Fixtures for all tests. The same code runs on one rank and, where marked mpi, on several."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from pnode_dist import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import ADJOINT_FLOORS
from pnode_dist.runs.snapshot_files import Background
from pnode_dist.system.compatibility import petsc_release
from tests.tiers import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

ROOT = Path(__file__).parents[1]
# A deadline is there to turn a hang into a failure, however slow the machine is.
PATIENCE = 300.0
# Nor does a slow machine fail a property.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
_STARTED = Background.start
_ADJOINT_MISSING = petsc_release() < max(ADJOINT_FLOORS.values())


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """With an older PETSc, skip a test of a gradient that is refused there, with the message of the refusal."""
    try:
        return (yield)
    except (ConfigurationError, AssertionError) as error:
        # An assertion where the test expects another error.
        if _ADJOINT_MISSING and "its gradient needs PETSc" in str(error):
            pytest.skip(str(error))
        raise


def pytest_collection_finish() -> None:
    """What is loaded by now stays: a test that collects garbage need not look through all modules."""
    gc.collect()
    gc.freeze()


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
    monkeypatch.setattr("pnode_dist.report.picture.render", lambda path, drawing: str(path))


def started_and_waited_for(background: Background, job: Callable[[], None]) -> None:
    """In place of `Background.start`: what a step leaves is on the disk before the next one."""
    _STARTED(background, job)
    background.wait()


@pytest.fixture
def every_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every snapshot that is due is on the disk before the next step."""
    monkeypatch.setattr(Background, "start", started_and_waited_for)


@pytest.fixture
def mpirun(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program on several ranks through launch/mpirun.sh: `mpirun(2, "python", "script.py")`."""

    def run(
        ranks: int, *command: str, timeout: float = PATIENCE, **environment: str
    ) -> subprocess.CompletedProcess[str]:
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
