"""Evaluation of a quasi-geostrophic run at every number of ranks: scores of the whole fields, in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.problems.qg import problem as module
from pnode_dist.problems.qg.evaluation import Run, evaluation_of
from pnode_dist.problems.qg.problem import QGProblem
from tests.unit.problems.qg.plain_qg import COARSE, INTERVAL, TIMES, config

pytestmark = pytest.mark.mpi

SAMPLES = 2
RUNS = ["truth", "model", "no_closure", "smagorinsky", "backscatter", "zanna_bolton"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of all ranks and tests."""
    return Path(MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("qg"))))


def whole(values: torch.Tensor, comm: MPI.Comm) -> np.ndarray:
    """Slabs along y of all ranks, `[..., y, x, layer]`."""
    return np.concatenate(comm.allgather(values.numpy()), axis=-3)


def test_long_runs_are_scored_as_whole_fields_are(mesh: Mesh, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The picture and the film have tests of their own.
    monkeypatch.setattr(QGProblem, "draw", lambda *_: None)
    monkeypatch.setattr(module, "draw", lambda path, *_: str(path))
    long = {"free_run": (SAMPLES + 0.5) * INTERVAL, "leads": [1, 2]}
    problem = QGProblem(config(place, evaluation=long), mesh, torch.float64)
    result: dict[str, Any] = problem.evaluate(problem.model, place)
    assert result["film"] == str(place / "free_runs.gif")

    comm, runs = problem.partition.comm, problem.free_runs(SAMPLES, INTERVAL)
    gathered = {name: Run(whole(run.q, comm), whole(run.forcing, comm), run.blown_up) for name, run in runs.items()}
    assert list(gathered) == RUNS
    wanted, _ = evaluation_of(gathered, problem.config.problem.parameters, INTERVAL / 24)
    # The sums over ranks are rounded in another order at each number of ranks, but runs of one number agree.
    assert json.dumps({name: result[name] for name in wanted}) == json.dumps(wanted)
    for row in result["free_runs"]:
        assert row["days"] == pytest.approx(SAMPLES * INTERVAL / 24)
        assert row["blown_up"] is None

    # Rank 0 wrote last of all ranks that it shares its files with.
    comm.Barrier()
    with h5py.File(place / "forecast.h5") as file:
        assert list(file["free_run"].asstr()[:]) == RUNS
        assert file["free_run_q"].shape == (6, max(SAMPLES + 1, TIMES), *COARSE, 2)
        for number, name in enumerate(RUNS):
            q = gathered[name].q if name != "truth" else gathered[name].q[0]
            np.testing.assert_allclose(file["free_run_q"][number, : len(q)], q, rtol=1e-6, atol=1e-12)


def test_the_forcing_of_a_long_run_is_that_of_its_states(mesh: Mesh, place: Path) -> None:
    problem = QGProblem(config(place), mesh, torch.float64)
    runs = problem.free_runs(1, INTERVAL)
    truth, subgrid = problem.trajectories
    held_out = problem.config.problem.trajectories
    assert torch.equal(runs["truth"].q, truth[held_out:])
    assert torch.equal(runs["truth"].forcing, subgrid[held_out:])
    for name, added in problem.closures().items():
        tendency = problem.tendency(added)
        states = runs[name].q / problem.scale
        torch.testing.assert_close(runs[name].forcing, tendency.closed(states), rtol=1e-9, atol=1e-22)
    assert runs["smagorinsky"].forcing.abs().max() > 0
