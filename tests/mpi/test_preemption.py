"""One rank is asked to stop, and all stop, in the middle of what they are doing."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import Mesh, Trajectory
from pnode_dist.config.tables import SnapshotConfig
from pnode_dist.ode import safe_points
from pnode_dist.runs import snapshot_files
from pnode_dist.runs.endings import Preempted
from pnode_dist.train import loop
from pnode_dist.train.preemption import Preemption
from tests.mpi.test_resume import COMM, TRAINING, Vectors, losses

pytestmark = pytest.mark.mpi

NEVER = SnapshotConfig(every_steps=0, every_minutes=0)
LAST = COMM.size - 1


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Rank 0's temporary directory, on all ranks."""
    shared: Path = COMM.bcast(tmp_path)
    return shared


class Slow:
    """Lets every step of a solve take a while."""

    def between_steps(self, comm: MPI.Comm) -> None:
        time.sleep(0.02)

    def after_solve(self, comm: MPI.Comm) -> None:
        pass


class Asked(Vectors):
    """The last rank is sent a signal in its loss number `at`, on the way forward or back, and that loss takes long."""

    def __init__(self, mesh: Mesh, at: int, backward: bool) -> None:
        super().__init__(mesh)
        self.at, self.backward, self.calls = at, backward, 0

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            # A million steps forward, or few but slow ones there and back.
            self.model.step_size = 0.02 if self.backward else 1e-6
            if self.backward:
                # A hook is called at every step that is recomputed, but not within the graph of several steps.
                self.model.trajectory = Trajectory(keep="solution")
            if not self.backward and self.mesh.rank == LAST:
                os.kill(os.getpid(), signal.SIGUSR1)
        share = super().loss(model, batch)
        if self.calls == self.at and self.backward and self.mesh.rank == LAST:
            share.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGTERM))  # type: ignore[no-untyped-call]
        return share


@pytest.mark.parametrize("data", sorted({1, COMM.size}))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_all_ranks_give_up_the_solve_under_way_and_go_on_later_to_the_same_end(
    data: int, backward: bool, directory: Path
) -> None:
    with Mesh(data=data) as mesh:
        if mesh.is_root:
            (directory / "whole").mkdir()
        mesh.barrier()
        whole: Any = Vectors(mesh)
        loop.train(whole, TRAINING, mesh, directory / "whole", NEVER)

        problem: Any = Asked(mesh, 3, backward)
        slow = safe_points.watched(Slow()) if backward else nullcontext()
        with Preemption(mesh) as preemption, slow, pytest.raises(Preempted) as stopped:
            loop.train(problem, TRAINING, mesh, directory, NEVER, None, "", preemption)
        text = str(stopped.value)
        assert text.startswith("stopped after step 2, in epoch 1 of 2: ")
        assert f"on rank {LAST} (" in text
        assert COMM.allgather(text) == [text] * COMM.size

        again: Any = Vectors(mesh)
        snapshot = snapshot_files.load(snapshot_files.path_of(directory, 2))
        loop.train(again, TRAINING, mesh, directory, NEVER, snapshot)

        assert all(map(torch.equal, again.parameters(), whole.parameters()))
        assert losses(directory) == losses(directory / "whole")
