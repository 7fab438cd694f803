"""Trajectories of the quasi-geostrophic problem on replicas, of which each computes its share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.qg import data
from pnode_dist.problems.qg.data import FineRuns
from pnode_dist.problems.qg.physics import initial_state
from tests.mpi.test_qg_data import CutError, runs

pytestmark = pytest.mark.mpi

SIZE = MPI.COMM_WORLD.size
# Two replicas on any even number of ranks.
REPLICAS = 2 if SIZE % 2 == 0 else SIZE
SHARED: dict[str, Any] = {"trajectories": 3, "validation": 2, "times": 2}
STEPS = 5 + 3


@pytest.fixture(scope="module")
def replicas() -> Iterator[Mesh]:
    with Mesh(data=REPLICAS) as mesh:
        yield mesh


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The trajectories that this rank writes, in order."""
    numbers: list[int] = []
    inner = FineRuns._write

    def write(self: FineRuns, one: data.Trajectory, number: int) -> None:
        inner(self, one, number)
        numbers.append(number)

    monkeypatch.setattr(FineRuns, "_write", write)
    return numbers


def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[int]]]:
    """Total, finished steps and advances of each progress bar of this rank."""
    bars: list[tuple[int, int, list[int]]] = []

    @contextmanager
    def show(_: Mesh, total: int, done: int) -> Iterator[data.Advance]:
        bars.append((total, done, []))
        yield bars[-1][2].append

    monkeypatch.setattr(data, "_shown", show)
    return bars


def alone(found: FineRuns, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both samples of a trajectory, as this replica's state ranks compute them without a file."""
    state = initial_state(found.fine, 1e-5, 0, number)
    q, forcing = [], []
    # The spin-up has five steps, and the interval three: parts end at its whole multiples before the first sample.
    for part, steps in enumerate((2, 3, 3)):
        state = data._solved(found.equations, found.small_scales, state, steps, 7200.0)
        if part:
            sample = found._sample(state)
            q.append(sample[0])
            forcing.append(sample[1])
    return torch.stack(q), torch.stack(forcing)


def test_each_replica_computes_its_share_to_the_bits_of_one_alone(
    directory: Path, replicas: Mesh, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = shown(monkeypatch)
    found = runs(directory, replicas, **SHARED)
    q, forcing = found.trajectories()
    assert written == list(range(5))[replicas.replica :: REPLICAS]
    ((total, done, advances),) = bars
    assert (total, done, sum(advances)) == (5 * STEPS, 0, 5 * STEPS)
    for number in range(5):
        expected = alone(found, number)
        assert torch.equal(q[number], expected[0])
        assert torch.equal(forcing[number], expected[1])


def test_only_missing_trajectories_are_shared_among_replicas(
    directory: Path, replicas: Mesh, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runs(directory, replicas, **SHARED)
    expected = first.trajectories()
    replicas.barrier()
    if replicas.is_root:
        for number in (0, 2, 3):
            first.path(number).unlink()
    replicas.barrier()
    written.clear()
    bars = shown(monkeypatch)
    again = runs(directory, replicas, **SHARED).trajectories()
    assert written == [0, 2, 3][replicas.replica :: REPLICAS]
    ((_, done, advances),) = bars
    assert (done, sum(advances)) == (2 * STEPS, 3 * STEPS)
    for values, read in zip(expected, again, strict=True):
        assert torch.equal(values, read)


@pytest.mark.nightly
def test_a_cut_run_goes_on_with_other_numbers_of_replicas(
    directory: Path, replicas: Mesh, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At least two for each replica, so that all are cut in the same part.
    shared = {**SHARED, "validation": 3}
    expected = runs(directory / "whole", replicas, **shared).trajectories()
    monkeypatch.setattr(data, "SAVE_SECONDS", -1.0)
    inner = data._solved
    calls = 0

    def cut(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            # In the second part of a replica's second trajectory, whose first part is written.
            raise CutError
        return inner(*given)

    monkeypatch.setattr(data, "_solved", cut)
    with pytest.raises(CutError):
        runs(directory / "cut", replicas, **shared).trajectories()
    monkeypatch.setattr(data, "_solved", inner)
    bars = shown(monkeypatch)
    runs(directory / "cut", mesh, **shared).trajectories()
    ((_, done, advances),) = bars
    assert done > 0
    assert done + sum(advances) == 6 * STEPS
    found = runs(directory / "cut", replicas, **shared).trajectories()
    for values, resumed in zip(expected, found, strict=True):
        # The fine runs went on over other numbers of state ranks.
        torch.testing.assert_close(values, resumed, rtol=0, atol=1e-11 * values.abs().max().item())


def test_a_failure_of_one_replica_ends_all_with_its_message(
    directory: Path, replicas: Mesh, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = data._replace

    def full(unfinished: Path, path: Path) -> None:
        if replicas.replica == REPLICAS - 1:
            raise ConfigurationError(f"{path.name}: cannot be written: the disk of replica {replicas.replica} is full")
        inner(unfinished, path)

    monkeypatch.setattr(data, "_replace", full)
    last = REPLICAS - 1
    with pytest.raises(ConfigurationError, match=rf"^trajectory_000{last}.h5: .* disk of replica {last} is full$"):
        runs(directory, replicas, **SHARED).trajectories()
    # The others finished their first trajectory in the same part, and began no further one.
    assert written == ([] if replicas.replica == last else [replicas.replica])
    assert not list(directory.rglob(".*"))


def test_a_solution_that_one_replica_finds_infinite_is_refused_on_all(
    directory: Path, replicas: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = data._solved

    def solved(*given: Any) -> torch.Tensor:
        values = inner(*given)
        return values / 0 if replicas.replica == REPLICAS - 1 and replicas.state_rank == 0 else values

    monkeypatch.setattr(data, "_solved", solved)
    with pytest.raises(ConfigurationError, match=r"is not finite 4 hours after its start"):
        runs(directory, replicas, **SHARED).trajectories()
