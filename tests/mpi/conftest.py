"""What tests at several ranks need: a mesh, a timeout each, and the same verdict on every rank."""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.system.abort import abort
from tests.tiers import cases_by_test, leave_out

TIMEOUT, PATIENCE = 300, 60
_verdicts = MPI.COMM_WORLD.Dup()
_AT_EVERY_SIZE = {
    "test_conv",
    "test_exchange",
    "test_fft",
    "test_fft_one_axis",
    "test_fft_pencils",
    "test_graph",
    "test_grid_axes",
    "test_partition",
}
_SIZE = MPI.COMM_WORLD.size
# Every way to write the number of ranks as state ranks times replicas.
SPLITS = [(state, _SIZE // state) for state in range(1, _SIZE + 1) if _SIZE % state == 0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--alternate-cases",
        action="store_true",
        help="of each test's cases every second one at 3 ranks, every fourth one at 4; tests of one case at 3 ranks or "
        "at 4, those of partitions and exchanges at both",
    )


# After the nightly ones are left out, as the first conftest does.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--alternate-cases"):
        left_out = [
            case
            for cases in cases_by_test(items)
            for number, case in enumerate(cases)
            if (_runs_elsewhere(case) if len(cases) == 1 else number % 2 if _SIZE % 2 else number % 4 != 1)
        ]
        leave_out(config, items, left_out, "cases, which run at another number of ranks")
    # A deadlock is a failure with the stacks of all threads, and ends the other ranks too.
    for item in items:
        if "mpi" in item.keywords and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT, method="thread"))


def _runs_elsewhere(item: pytest.Item) -> bool:
    """Return True for a test whose turn is at another number of ranks. It does not depend on the other tests."""
    return item.path.stem not in _AT_EVERY_SIZE and zlib.crc32(item.nodeid.encode()) % 2 != _SIZE % 2


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Let a test that failed on one rank fail on all; end the run when the others are stuck waiting for it."""
    report = yield
    if call.when != "call" or _verdicts.size == 1 or "mpi" not in item.keywords:
        return report
    failed = np.array([report.failed], dtype="i")
    anywhere = np.empty(_verdicts.size, dtype="i")
    agreement = _verdicts.Iallgather(failed, anywhere)
    deadline = time.monotonic() + (PATIENCE if report.failed else 2 * TIMEOUT)
    while not agreement.Test():
        if time.monotonic() > deadline:
            print(f"\nrank {_verdicts.rank}: {item.nodeid} ended here and not elsewhere\n{report.longreprtext}")
            sys.__stderr__.write(f"\nrank {_verdicts.rank}: {item.nodeid}\n{report.longreprtext}\n")  # type: ignore[union-attr]
            sys.__stderr__.flush()  # type: ignore[union-attr]
            abort(1, MPI.COMM_WORLD)
        time.sleep(1e-4)
    if anywhere.any() and not report.failed:
        report.outcome = "failed"
        report.longrepr = f"failed on rank {', '.join(str(rank) for rank in np.flatnonzero(anywhere))}"
    return report


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """All ranks as state ranks of one replica, for a whole file."""
    with Mesh() as mesh:
        yield mesh


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """One directory for all ranks."""
    yield Path(MPI.COMM_WORLD.bcast(str(tmp_path)))
    MPI.COMM_WORLD.Barrier()


@pytest.fixture
def comm() -> MPI.Comm:
    """All ranks."""
    return MPI.COMM_WORLD


@pytest.fixture(params=["mpi", "gloo"], ids=lambda backend: f"backend {backend}")
def backend(request: pytest.FixtureRequest) -> str:
    """Each of the backends that run on CPUs."""
    name: str = request.param
    return name


@pytest.fixture(params=SPLITS, ids=[f"{state} x {data}" for state, data in SPLITS])
def split(request: pytest.FixtureRequest, backend: str) -> Iterator[Mesh]:
    """A mesh of each shape that the ranks allow."""
    state, data = request.param
    with Mesh(state, data, backend=backend) as mesh:
        yield mesh
