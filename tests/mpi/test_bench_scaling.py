"""The benchmark of scaling: some ranks work while the others sleep, and all of them come to the same gradient."""

from __future__ import annotations

import math
import os
import time

import pytest
import torch
import torchdiffeq
from mpi4py import MPI

from pnode_dist.bench import scaling as bench
from pnode_dist.bench.some_ranks import cores_of, on_first, threads
from pnode_dist.bench.training_step import TrainingStep, exchanged_channels

pytestmark = pytest.mark.mpi

COMM = MPI.COMM_WORLD


def test_ranks_that_are_not_needed_leave_their_cores_alone() -> None:
    def work() -> float:
        until = time.perf_counter() + 0.4
        while time.perf_counter() < until:
            pass
        return 1.0 + COMM.rank

    began, worked = time.perf_counter(), time.process_time()
    assert on_first(COMM, 1, work) == 1.0
    if COMM.rank > 0:
        # However slow the machine is, whoever sleeps most of the time does not work for most of it.
        assert time.process_time() - worked < 0.5 * (time.perf_counter() - began)
    assert on_first(COMM, COMM.size, work) == float(COMM.size)


def test_threads_get_all_cores_of_the_ranks_and_give_them_back() -> None:
    cores = cores_of(COMM)
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    with threads(2, cores):
        assert torch.get_num_threads() == 2
        assert os.sched_getaffinity(0) == cores
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before
    assert before[1] <= cores


def test_the_step_on_all_ranks_has_the_gradient_of_plain_torch() -> None:
    step = TrainingStep(COMM, (12, 16), dtype=torch.float64)
    assert step.seconds() > 0
    alone = TrainingStep(MPI.COMM_SELF, (12, 16), dtype=torch.float64)
    state = alone.state
    for _ in range(alone.steps):
        k1 = alone.func(torch.zeros(()), state)
        k2 = alone.func(torch.zeros(()), state + k1 / 2)
        k3 = alone.func(torch.zeros(()), state + k2 / 2)
        k4 = alone.func(torch.zeros(()), state + k3)
        state = state + (k1 + 2 * k2 + 2 * k3 + k4) / 6
    expected = torch.autograd.grad(state.square().sum(), list(alone.func.parameters()))
    torch.testing.assert_close(
        step.gradient, torch.cat([part.reshape(-1) for part in expected]), rtol=1e-11, atol=1e-11
    )


def test_the_exchanges_are_those_of_the_right_hand_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from pnode_dist.nn import conv

    step = TrainingStep(COMM, (12, 16))
    found = []
    original = conv.halo
    monkeypatch.setattr(conv, "halo", lambda x, *rest: found.append(x.shape[-1]) or original(x, *rest))
    with torch.no_grad():
        step.func(torch.zeros(()), step.state)
    assert found == exchanged_channels()


def test_a_run_measures_every_number_of_ranks_and_predicts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SMALL", (6,))
    report = bench.measured(COMM, torchdiffeq.odeint, 24, rounds=1)
    counts = bench.rank_counts(COMM.size)
    for kind in ("strong", "weak"):
        rows = [row for row in report.rows if row["what"] == kind]
        assert [row["ranks"] for row in rows] == counts
        assert all(float(row["halo"]) + float(row["sum"]) > 0 for row in rows)
        assert all(math.isfinite(float(row["predicted"])) == (COMM.size > 1) for row in rows)
        # What was measured on one rank is what the model knows.
        if COMM.size > 1:
            assert rows[0]["predicted"] == rows[0]["seconds"]
    whats = {str(row["what"]) for row in report.rows}
    assert ("no messages" in whats) == (COMM.size > 1)
    assert any(what.startswith("torchdiffeq") for what in whats)
    assert ("projected strong" in whats) == ("projected weak" in whats) == (COMM.size > 1)
    differences = [check for check in report.checks if check.name.startswith("gradient")]
    assert len(differences) == len(counts) - 1
    assert all(check.holds for check in differences)
    spectral = report.further["scaling, spectral"]
    for kind in ("strong", "weak"):
        rows = [row for row in spectral if row["what"] == kind]
        assert [row["ranks"] for row in rows] == counts
        assert all(math.isfinite(float(row["predicted"])) == (COMM.size > 1) for row in rows)
    differences = [check for check in report.checks if check.name.startswith("spectral gradient")]
    assert len(differences) == len(counts) - 1
    assert all(check.holds for check in differences)
    assert all(row == other for row, other in zip(_timings(report), COMM.bcast(_timings(report)), strict=True))


def _timings(report: bench.Report) -> list[str]:
    return [str(row) for row in report.rows]
