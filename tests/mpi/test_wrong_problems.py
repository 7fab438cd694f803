"""Mistakes in a problem of one's own: every rank ends with exit code 2, and the first says why in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mpi4py import MPI

from pnode_dist.cli.main import main
from tests.own_problems import SOURCE, TOML, WRONG, changed, written

RANK_DEPENDENT = {
    "data of different lengths": (
        changed("times = 0.25 * np.arange(7)", "times = 0.25 * np.arange(7 - self.mesh.rank)"),
        TOML,
        r"the ranks have different data: rank 0 has 4 trajectories of 7 times, rank 1 4 trajectories of 6 times",
    ),
    "other times on one rank": (
        changed("times = 0.25 * np.arange(7)", "times = (0.25 + 0.1 * self.mesh.rank) * np.arange(7)"),
        TOML,
        r"Own\.load_data: the ranks have different data: .* rank 1 other times",
    ),
    "not a number on the last rank": (
        changed("return TrajectoryData(", "starts[3, 0, -1] = np.nan; return TrajectoryData("),
        TOML,
        r"Own\.load_data: 7 values are not finite",
    ),
    "data of another type on one rank": (
        changed(
            "return TrajectoryData(starts",
            "starts = starts if self.mesh.rank == 0 else np.full((4, 1, 5), 1j)\n        return TrajectoryData(starts",
        ),
        TOML,
        r"Own\.load_data: values are of type complex128: must be real numbers",
    ),
    "an import that fails on one rank": (
        "from mpi4py import MPI\nif MPI.COMM_WORLD.rank == 1: raise OSError('no disk')\n" + SOURCE,
        TOML,
        r"own\.py:2: OSError: no disk",
    ),
}


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """One directory for all ranks."""
    return Path(MPI.COMM_WORLD.bcast(str(tmp_path)))


@pytest.mark.mpi
@pytest.mark.parametrize("wrong", [*WRONG, *RANK_DEPENDENT])
def test_a_mistake_ends_every_rank_with_code_2(
    wrong: str, shared: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = MPI.COMM_WORLD
    if wrong in RANK_DEPENDENT and comm.size == 1 and "last rank" not in wrong:
        pytest.skip("one rank has nothing to differ from")
    source, toml, expected = {**WRONG, **RANK_DEPENDENT}[wrong]
    monkeypatch.chdir(shared)
    if comm.rank == 0:
        written(shared, source, toml)
    comm.Barrier()
    code = main(["train", "own.toml"])
    said = capfd.readouterr().err.splitlines()
    assert comm.allgather(code) == [2] * comm.size
    assert len(said) == (comm.rank == 0)
    if comm.rank == 0:
        assert re.search(expected, said[0]), said[0]
