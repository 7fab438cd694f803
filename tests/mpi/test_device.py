"""`[training] device` where not every rank has a GPU."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI

from pnode_dist import ConfigurationError, Mesh
from pnode_dist.train.device import device_of

pytestmark = pytest.mark.mpi

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank


@pytest.fixture
def some_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU for each rank but the last."""
    count = SIZE - 1 if RANK < SIZE - 1 else 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_rank_without_a_gpu_is_the_same_line_on_all(some_gpus: None, mesh: Mesh) -> None:
    wanted = rf"^training.device = 'cuda': torch finds no GPU on rank {SIZE - 1}: must be cpu, auto, or a GPU"
    with pytest.raises(ConfigurationError, match=wanted):
        device_of("cuda", mesh)
    assert device_of("auto", mesh) == torch.device("cpu")


def test_ranks_of_one_node_take_one_gpu_after_the_other(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "auto"):
        assert device_of(name, mesh) == torch.device("cuda", RANK % 2)
    assert device_of("cuda:1", mesh) == torch.device("cuda", 1)
