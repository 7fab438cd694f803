"""A rank that waits for others in vain ends the job, once every rank that waits has said where it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pnode_dist import ConfigurationError, Mesh
from pnode_dist.distributed import agreement
from pnode_dist.distributed.agreement import Description, by_value, differences, ranks_in_words
from tests.conftest import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]

PREAMBLE = """
import sys, time
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn
from pnode_dist import BatchPartition, Mesh, odeint
from pnode_dist.distributed.gradients import parallel

world = MPI.COMM_WORLD
last = world.rank == world.size - 1

def solve(partition):
    u0 = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
    return odeint(lambda t, u: -u, u0, [0.0, 1.0], partition=partition, step_size=1.0).sum()

def elsewhere():
    while True:
        time.sleep(0.01)
"""
LIMIT = 5


@pytest.fixture
def ended(mpirun: Run, tmp_path: Path) -> Callable[[int, str], subprocess.CompletedProcess[str]]:
    """A program on several ranks, which wait for each other for 5 s at most, once it has ended."""

    def run(ranks: int, body: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "program.py").write_text(f"{PREAMBLE}\n{body}")
        path = {"PYTHONPATH": str(ROOT), "PNODE_DIST_TIMEOUT": str(LIMIT)}
        return mpirun(ranks, sys.executable, "program.py", **path)

    return run


def waiting(ended: subprocess.CompletedProcess[str]) -> dict[int, str]:
    """What each rank said that it waited for."""
    lines = re.findall(r"^pnode_dist: rank (\d+) of \d+(?: \([^)]*\))?: waited (.*)$", ended.stderr, re.MULTILINE)
    assert len({rank for rank, _ in lines}) == len(lines), ended.stderr
    for _, text in lines:
        assert text.endswith(" for the other ranks")
    return {int(rank): text for rank, text in lines}


ONLY_FIRST = """
with Mesh(timeout=5) as mesh:
    loss = solve(BatchPartition(mesh, 2 * mesh.size, (5,)))
    if mesh.rank == 0:
        loss.backward()
    elsewhere()
"""


def test_a_backward_pass_of_one_rank_alone_ends_the_job(ended: Run) -> None:
    job = ended(3, ONLY_FIRST)
    assert job.returncode == 70
    said = waiting(job)
    assert list(said) == [0]
    assert "at the beginning of the backward pass of solve 1 (method rk4, 2 times, state [2, 5] float64; " in said[0]
    line = next(n for n, text in enumerate(f"{PREAMBLE}\n{ONLY_FIRST}".splitlines(), 1) if "loss.backward()" in text)
    assert f"; program.py:{line})" in said[0]
    assert "no answer from ranks 1, 2 of 3" in job.stderr
    assert "the limit is 5 s: set Mesh(timeout=...) or PNODE_DIST_TIMEOUT" in job.stderr


def test_a_rank_that_closes_the_mesh_ends_the_backward_pass_of_others(ended: Run) -> None:
    body = """
with Mesh() as mesh:
    loss = solve(BatchPartition(mesh, 2 * mesh.size, (5,)))
    if not last:
        loss.backward()
"""
    job = ended(3, body)
    assert job.returncode == 1
    for rank in (0, 1):
        text = f"DisagreementError: rank 2 of 3 has left, and rank {rank} is at the beginning of the backward pass"
        assert text in job.stderr
        # Not at the deadline.
    assert waiting(job) == {}


def test_ranks_may_close_the_mesh_long_after_each_other(ended: Run) -> None:
    body = """
with Mesh(timeout=5) as mesh:
    solve(BatchPartition(mesh, 2 * mesh.size, (5,))).backward()
    if last:
        time.sleep(8)
print("ended", flush=True)
"""
    job = ended(3, body)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("ended") == 3


def test_a_rank_that_leaves_by_an_error_it_catches_keeps_no_other_waiting(ended: Run) -> None:
    body = """
try:
    with Mesh() as mesh:
        solve(BatchPartition(mesh, 2 * mesh.size, (5,)))
        if mesh.rank == 0:
            raise KeyError
except KeyError:
    pass
print("ended", flush=True)
"""
    job = ended(3, body)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("ended") == 3


@pytest.mark.parametrize("ending", ["sys.exit(0)", "raise RuntimeError('mine')"], ids=["exit", "exception"])
def test_ranks_that_wait_for_one_that_has_ended_say_so_and_end(ending: str, ended: Run) -> None:
    body = f"""
partition = BatchPartition(world, 2 * world.size, (5,))
solve(partition).backward()
if last:
    {ending}
solve(partition)
"""
    job = ended(3, body)
    assert job.returncode == 70
    said = waiting(job)
    assert set(said) == {0, 1}
    assert all("at the beginning of solve 2 (method rk4, " in text for text in said.values())
    assert "no answer from rank 2 of 3" in job.stderr


def test_ranks_at_solves_of_different_partitions_all_say_where_they_stand(ended: Run) -> None:
    body = """
here, there = (BatchPartition(world.Dup(), 2 * world.size, (5,)) for _ in range(2))
solve(there)
solve(there if last else here)
"""
    job = ended(4, body)
    assert job.returncode == 70
    said = waiting(job)
    assert set(said) == {0, 1, 2, 3}
    assert all("at the beginning of solve 1 (" in said[rank] for rank in range(3))
    assert "at the beginning of solve 2 (" in said[3]
    assert "no answer" not in job.stderr


def test_an_exchange_in_user_code_beside_a_solve_ends_the_job(ended: Run) -> None:
    body = """
partition = BatchPartition(world, 2 * world.size, (5,))
if last:
    world.allreduce(1)
solve(partition)
"""
    job = ended(2, body)
    assert job.returncode == 70
    assert list(waiting(job)) == [0]


def test_an_error_of_f_that_one_rank_catches_ends_the_job(ended: Run) -> None:
    body = """
def f(t, u):
    if last:
        raise KeyError
    return -u

with Mesh() as mesh:
    partition = BatchPartition(mesh, 2 * mesh.size, (5,))
    u0 = torch.ones(2, 5, dtype=torch.float64)
    try:
        odeint(f, u0, [0.0, 1.0], partition=partition)
    except KeyError:
        elsewhere()
    solve(partition)
"""
    job = ended(2, body)
    assert job.returncode == 70
    assert "at the beginning of the comparison of one step with two (" in waiting(job)[0]


def test_a_gradient_sum_of_some_ranks_alone_ends_the_job(ended: Run) -> None:
    body = """
with Mesh(state=1, data=world.size, timeout=5) as mesh:
    model = parallel(nn.Linear(2, 2), mesh)
    loss = model(torch.ones(1, 2)).sum()
    if last:
        elsewhere()
    loss.backward()
"""
    job = ended(3, body)
    assert job.returncode == 70
    said = waiting(job)
    assert set(said) == {0, 1}
    assert all(
        "of a process group (kind all_reduce, numbers 6, dtype torch.float32, reduction SUM; program.py:" in text
        for text in said.values()
    )


@pytest.mark.parametrize("operation", ["dist.recv(torch.ones(3), 1)", "dist.send(torch.ones(10**6), 1)"])
def test_a_message_that_the_other_rank_does_not_exchange_ends_the_job(operation: str, ended: Run) -> None:
    body = f"""
with Mesh() as mesh:
    if last:
        elsewhere()
    {operation}
"""
    job = ended(2, body)
    assert job.returncode == 70
    assert "at the exchange of a message " in waiting(job)[0]


def test_gloo_has_the_timeout_of_the_mesh(ended: Run) -> None:
    body = """
with Mesh(backend="gloo", timeout=2) as mesh:
    if last:
        elsewhere()
    mesh.barrier()
"""
    job = ended(2, body)
    assert job.returncode == 1
    assert "2000ms" in job.stderr


def test_the_default_timeout_is_ten_minutes_or_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PNODE_DIST_TIMEOUT", raising=False)
    assert agreement.default_timeout() == 600
    with Mesh() as mesh:
        assert mesh.timeout == 600
    monkeypatch.setenv("PNODE_DIST_TIMEOUT", "2.5")
    assert agreement.default_timeout() == 2.5
    with Mesh(timeout=7) as mesh:
        assert mesh.timeout == 7
        assert agreement.of(mesh.state_comm).timeout == 7
        agreement.set_timeout(mesh.state_comm, 0)
        assert agreement.of(mesh.state_comm).timeout == 0


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf", ""])
def test_a_timeout_in_the_environment_that_is_no_number_of_seconds_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNODE_DIST_TIMEOUT", text)
    with pytest.raises(ConfigurationError, match=f"PNODE_DIST_TIMEOUT = '{text}': must be a number of seconds"):
        Mesh()


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", True])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(timeout: object) -> None:
    with pytest.raises(ConfigurationError, match=r"timeout = .*: must be a number of seconds, or 0"):
        Mesh(timeout=timeout)  # type: ignore[arg-type]


def test_a_digest_does_not_depend_on_the_process() -> None:
    # Python's own hash of a string does.
    assert agreement.digest(("rk4", (0.0, 1.0), None)) == 0x137D417A0A7EAF2E
    assert agreement.digest(("rk4", (0.0, 1.5), None)) != agreement.digest(("rk4", (0.0, 1.0), None))


def test_numbers_of_calls_change_a_fingerprint() -> None:
    found = {agreement.numbered(agreement.digest("solve"), number) for number in range(10_000)}
    assert len(found) == 10_000
    assert all(0 <= value < 2**61 for value in found)


def test_a_difference_names_the_ranks_and_the_first_entry_that_differs() -> None:
    calls = [Description("solve 1", {"t": (0.0, 1.0 + (rank == 2), 2.0), "method": "rk4"}) for rank in range(4)]
    assert differences(calls) == ["t[1]: ranks 0, 1, 3: 1.0; rank 2: 2.0"]
    assert differences(calls[:2]) == []
    lengths = [Description("solve 1", {"t": (0.0,) * (2 + rank)}) for rank in range(2)]
    assert differences(lengths) == ["length of t: rank 0: 2; rank 1: 3"]


def test_long_values_and_many_ranks_make_short_lines() -> None:
    assert ranks_in_words(range(1000)) == "ranks 0, 1, 2, 3, ... (1000 ranks)"
    assert by_value(["a"] * 20 + ["b"]) == "ranks 0, 1, 2, 3, ... (20 ranks): a; rank 20: b"
    assert len(agreement.shown("x" * 10_000)) < 130
