"""On several ranks: a resumed run is the run that was never stopped, and goes on on another mesh as well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import Mesh, NeuralODE
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.config.tables import SnapshotConfig, TrainingConfig
from pnode_dist.distributed.gradients import share_of_mean
from pnode_dist.errors import ConfigurationError
from pnode_dist.nn import Linear
from pnode_dist.partition.dense import DensePartition
from pnode_dist.runs import snapshot_files
from pnode_dist.train import loop

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("every_snapshot")]

COMM = MPI.COMM_WORLD
SIZE, SAMPLES, BATCH = 7, 12, 4
TRAINING = TrainingConfig(
    epochs=2, learning_rate=0.02, dtype="float64", schedule="cosine", validate_every=1, keep="best"
)
EVERY_STEP = SnapshotConfig(every_steps=1, every_minutes=0, keep=100)


class Coupled(nn.Module):
    """du/dt = V tanh(W u) - u, with W and V split over the ranks, b whole, and a running mean of each rank's own."""

    def __init__(self, vectors: DensePartition) -> None:
        super().__init__()
        self.inner = Linear(vectors, vectors, shard=True, dtype=torch.float64)
        self.outer = Linear(vectors, vectors, shard=True, dtype=torch.float64)
        self.rate = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.add_(1.0)
        return self.outer(torch.tanh(self.inner(u))) - self.rate * u


class Vectors:
    """Vectors that are to shrink, with noise of each replica's own."""

    name, units = "vectors", ""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.partition = DensePartition(mesh, SIZE)
        torch.manual_seed(1)
        self.model = NeuralODE(Coupled(self.partition), step_size=0.5, partition=self.partition)
        self.whole = torch.randn(SAMPLES, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        self.noise = 0.0

    def batches(self, epoch: int, done: int = 0) -> Iterator[torch.Tensor]:
        begin, end = self.partition.owned
        for number in range(done, SAMPLES // BATCH):
            share = self.whole[number * BATCH : (number + 1) * BATCH][self.mesh.replica :: self.mesh.data_replicas]
            yield share[:, begin:end] * epoch

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        final = model(batch, torch.tensor([0.0, 1.0], dtype=torch.float64))[-1]
        noise = self.noise * torch.randn(final.shape, dtype=torch.float64)
        return share_of_mean((final + noise).square().sum(), len(batch) * SIZE, self.mesh)

    def validation(self, model: nn.Module) -> dict[str, float]:
        begin, end = self.partition.owned
        final = model(self.whole[:, begin:end], torch.tensor([0.0, 1.0], dtype=torch.float64))[-1]
        return {"size": self.mesh.sum(final.square().sum(), over="state").item()}

    def solve_statistics(self) -> SolveStatistics:
        return self.model.last_solve

    def parameters(self) -> list[torch.Tensor]:
        return [value.detach().clone() for value in self.model.parameters()]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Rank 0's temporary directory, on all ranks."""
    shared: Path = COMM.bcast(tmp_path)
    return shared


def load(directory: Path, step: int) -> Any:
    COMM.barrier()
    return snapshot_files.load(snapshot_files.path_of(directory, step))


def losses(directory: Path) -> list[float]:
    COMM.barrier()
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("data", [1, COMM.size])
def test_split_weights_and_random_states_of_every_rank_are_resumed_to_the_same_bits(data: int, directory: Path) -> None:
    with Mesh(data=data) as mesh:
        problem = Vectors(mesh)
        problem.noise = 0.1
        torch.manual_seed(10 + mesh.rank)
        whole = loop.train(problem, TRAINING, mesh, directory, EVERY_STEP)
        if mesh.is_root:
            (directory / "again").mkdir()

        resumed = Vectors(mesh)
        resumed.noise = 0.1
        outcome = loop.train(resumed, TRAINING, mesh, directory / "again", EVERY_STEP, load(directory, 4))

        assert all(map(torch.equal, resumed.parameters(), problem.parameters()))
        assert torch.equal(resumed.model.func.seen, problem.model.func.seen)
        assert (outcome.loss, outcome.figures, outcome.kept_epoch) == (whole.loss, whole.figures, whole.kept_epoch)
        assert losses(directory / "again") == losses(directory)[4:]
        # Of the split weights there is the whole.
        assert load(directory, 4).parameters["func.inner.weight"].shape == (SIZE, SIZE)


@pytest.mark.skipif(COMM.size == 1, reason="one rank has one mesh")
def test_on_another_mesh_a_run_resumes_to_the_same_result_but_for_rounding(
    directory: Path,
) -> None:
    with Mesh() as mesh:
        loop.train(Vectors(mesh), TRAINING, mesh, directory, EVERY_STEP)
        if mesh.is_root:
            (directory / "again").mkdir()
        start = load(directory, 4)
    with Mesh(data=COMM.size) as mesh:
        resumed = Vectors(mesh)
        loop.train(resumed, TRAINING, mesh, directory / "again", EVERY_STEP, start)

        assert losses(directory / "again") == pytest.approx(losses(directory)[4:], rel=1e-10)
        end, again = load(directory, 6), load(directory / "again", 6)
        for name, value in end.parameters.items():
            torch.testing.assert_close(again.parameters[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(COMM.size == 1, reason="one rank has one mesh")
def test_a_buffer_of_each_ranks_own_keeps_a_run_on_its_mesh(directory: Path) -> None:
    with Mesh() as mesh:
        problem = Vectors(mesh)
        problem.model.func.seen += mesh.rank
        loop.train(problem, TRAINING, mesh, directory, EVERY_STEP)
        if mesh.is_root:
            (directory / "again").mkdir()
        start = load(directory, 4)
    with (
        Mesh(data=COMM.size) as mesh,
        pytest.raises(ConfigurationError, match=r"^the buffer func.seen is not the same"),
    ):
        loop.train(Vectors(mesh), TRAINING, mesh, directory / "again", EVERY_STEP, start)


def test_a_disk_that_is_full_on_rank_0_ends_all_ranks_alike(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pnode_dist.runs.endings import RunDirectoryError

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot_files, "write", full)
    with Mesh() as mesh, pytest.raises(RunDirectoryError, match="No space left on device; there is no snapshot"):
        loop.train(Vectors(mesh), TRAINING, mesh, directory, EVERY_STEP)
