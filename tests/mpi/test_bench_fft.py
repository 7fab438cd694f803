"""The benchmark of Fourier transforms compares with torch's on the whole field, and counts every message."""

from __future__ import annotations

import pytest
from mpi4py import MPI

from pnode_dist.bench import fft as bench

pytestmark = pytest.mark.mpi

COMM = MPI.COMM_WORLD


def test_values_adjoints_and_counts_are_those_of_the_whole_field() -> None:
    report = bench.measured(COMM, 24, 1)
    checks = {check.name: check for check in report.checks}
    exact = [check for name, check in checks.items() if "dot product" in name or "difference" in name]
    assert len(exact) == 4 * len(bench.rank_counts(COMM.size))
    assert all(check.holds for check in exact)
    rows = {(row["transform"], row["ranks"]): row for row in report.rows if row["what"] == "slabs"}
    for transform in bench.TRANSFORMS:
        row = rows[transform.name, COMM.size]
        assert row["messages"] == COMM.size - 1
        # Of its rows a rank keeps the wave numbers of its own columns, and sends all others.
        columns = 13 if transform.half else 24
        fewest = columns // COMM.size
        most_rows = -(-24 // COMM.size)
        assert 0 <= float(row["MB"]) * 1e6 <= most_rows * (columns - fewest) * bench.CHANNELS * 16
        assert (float(row["MB"]) == 0) == (COMM.size == 1)


@pytest.mark.nightly
def test_a_wrong_adjoint_is_not_within_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    product = bench._product
    calls = [0]

    def wrong(a: object, b: object) -> float:
        calls[0] += 1
        return product(a, b) * (1 + 1e-9 * (calls[0] % 2))  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "_product", wrong)
    report = bench.measured(COMM, 16, 1)
    assert not all(check.holds for check in report.checks if "dot product" in check.name)
