"""Trajectories of the quasi-geostrophic problem at every number of ranks: those of numpy, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.qg import data
from pnode_dist.problems.qg.config import QGConfig
from pnode_dist.problems.qg.data import FineRuns, partition_of
from pnode_dist.problems.qg.physics import initial_state
from tests.oracles import quasi_geostrophic

pytestmark = pytest.mark.mpi

COARSE, FINE = (8, 12), (16, 24)
SMALL: dict[str, Any] = {
    "type": "qg",
    "shape": COARSE,
    "fine": FINE,
    "L": 4e5,
    "fine_step": 2.0,
    "interval": 6.0,
    "spin_up": 10.0,
    "amplitude": 1e-5,
    "trajectories": 1,
    "validation": 1,
    "times": 3,
    "window": 1,
}


def runs(directory: Path, mesh: Mesh, **changed: Any) -> FineRuns:
    config = QGConfig(**{**SMALL, "data": str(directory / "data"), **changed})
    return FineRuns(config, partition_of(mesh, COARSE), mesh)


def own(partition: GridPartition, whole: np.ndarray) -> torch.Tensor:
    """This rank's part of a whole field `[layer, y, x]`, layers last."""
    last = torch.from_numpy(np.ascontiguousarray(np.moveaxis(whole, 0, -1)))
    return last[(..., *partition.owned_slices(partition.comm.rank))]


class CutError(Exception):
    """The end of a run in the middle."""


@pytest.mark.parametrize("coarse_spin_up", [0.0, 10.0])
def test_samples_are_the_filtered_states_and_forcings_of_numpy(
    coarse_spin_up: float, directory: Path, mesh: Mesh
) -> None:
    found = runs(directory, mesh, coarse_spin_up=coarse_spin_up)
    q, forcing = found.trajectories()
    assert q.shape == forcing.shape == (2, 3, *found.coarse.local_shape)
    noise = GridPartition(MPI.COMM_SELF, COARSE if coarse_spin_up else FINE, 2, ("periodic", "periodic"), 1)
    state = np.moveaxis(initial_state(noise, 1e-5, 0, 1).numpy(), -1, 0)
    if coarse_spin_up:
        for _ in range(3):
            state = quasi_geostrophic.step(state, 4e5, 12_000.0)
        state = quasi_geostrophic.refined(state, FINE, "sharp")
    for steps in range(5 + 2 * 3 + 1):
        if steps >= 5 and (steps - 5) % 3 == 0:
            low = quasi_geostrophic.coarsened(state, COARSE, "sharp")
            rate = quasi_geostrophic.coarsened(quasi_geostrophic.tendency(state, 4e5), COARSE, "sharp")
            lacking = rate - quasi_geostrophic.tendency(low, 4e5)
            sample = (steps - 5) // 3
            torch.testing.assert_close(q[1, sample], own(found.coarse, low), rtol=0, atol=1e-16)
            scale = np.abs(rate).max()
            torch.testing.assert_close(forcing[1, sample], own(found.coarse, lacking), rtol=0, atol=1e-11 * scale)
        state = quasi_geostrophic.step(state, 4e5, 7200.0)


def test_samples_are_read_and_not_computed_again(directory: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs(directory, mesh).trajectories()

    def refuse(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(data, "_solved", refuse)
    monkeypatch.setattr(FineRuns, "_write", refuse)
    again = runs(directory, mesh).trajectories()
    fewer = runs(directory, mesh, times=2, trajectories=1).trajectories()
    with Mesh(1, mesh.size) as replicas:
        whole = runs(directory, replicas).trajectories()
    for values, read, part, alone in zip(first, again, fewer, whole, strict=True):
        assert torch.equal(values, read)
        assert torch.equal(values[:, :2], part)
        rows = slice(*partition_of(mesh, COARSE).owned[0])
        assert torch.equal(values, alone[:, :, rows])


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(
    directory: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = runs(directory / "whole", mesh).trajectories()
    monkeypatch.setattr(data, "SAVE_SECONDS", -1.0)
    inner = data._solved
    calls: list[int] = []

    def run(until: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.clear()

        def cut(*given: Any) -> torch.Tensor:
            calls.append(given[3])
            if len(calls) == until:
                raise CutError
            return inner(*given)

        monkeypatch.setattr(data, "_solved", cut)
        return runs(directory / "cut", mesh).trajectories()

    # In the spin-up, and between the samples of the second trajectory.
    for until in (2, 7):
        with pytest.raises(CutError):
            run(until)
    found = run(100)
    assert len(calls) == 1
    for values, resumed in zip(expected, found, strict=True):
        assert torch.equal(values, resumed)


def test_more_samples_go_on_from_the_last_state(directory: Path, mesh: Mesh) -> None:
    expected = runs(directory / "long", mesh, times=4).trajectories()
    runs(directory / "short", mesh).trajectories()
    found = runs(directory / "short", mesh, times=4).trajectories()
    for values, longer in zip(expected, found, strict=True):
        assert torch.equal(values, longer)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"rek": 1e-7},
        {"operator": "gaussian"},
        {"fine_step": 1.0},
        {"spin_up": 12.0},
        {"coarse_spin_up": 12.0},
    ],
)
def test_other_parameters_have_a_folder_of_their_own(changed: dict[str, Any], directory: Path, mesh: Mesh) -> None:
    assert runs(directory, mesh, **changed).folder != runs(directory, mesh).folder
    assert runs(directory, mesh, window=2, data=str(directory / "data")).folder == runs(directory, mesh).folder


def test_files_of_other_parameters_or_none_are_refused(directory: Path, mesh: Mesh) -> None:
    found = runs(directory, mesh)
    found.trajectories()
    if mesh.is_root:
        with h5py.File(found.path(1), "r+") as file:
            file.attrs["recipe"] = "{}"
    MPI.COMM_WORLD.Barrier()
    with pytest.raises(ConfigurationError, match=r"trajectory_0001.h5: was computed from other parameters"):
        found.trajectories()
    MPI.COMM_WORLD.Barrier()
    if mesh.is_root:
        found.path(1).write_bytes(b"not HDF5")
    MPI.COMM_WORLD.Barrier()
    with pytest.raises(ConfigurationError, match=r"trajectory_0001.h5: is no readable trajectory"):
        found.trajectories()


def test_a_fine_run_that_becomes_infinite_is_refused_on_all_ranks(directory: Path, mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=r"^\[problem\] fine_step = 2: the solution .* is not finite"):
        runs(directory, mesh, amplitude=1e3).trajectories()


def test_a_folder_that_cannot_be_made_is_refused(directory: Path, mesh: Mesh) -> None:
    if mesh.is_root:
        (directory / "file").write_text("")
    MPI.COMM_WORLD.Barrier()
    with pytest.raises(ConfigurationError, match=r"^\[problem\] data = .*: cannot be written: Not a directory"):
        runs(directory, mesh, data=str(directory / "file" / "data")).trajectories()
