"""A value that is not finite on one rank ends all of them with the number of that rank."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pnode_dist import Mesh
from pnode_dist.config.tables import SnapshotConfig
from pnode_dist.runs import snapshot_files
from pnode_dist.runs.endings import DivergenceError
from pnode_dist.train import loop
from tests.mpi.test_resume import COMM, TRAINING, Vectors

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("every_snapshot")]

LAST = COMM.size - 1


class Spoiler(nn.Module):
    """Hands on what it is given, and on the last rank no number once it is `armed`, or nothing to differentiate."""

    armed = False

    def __init__(self, backward: bool) -> None:
        super().__init__()
        self.backward = backward

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        if not self.armed or COMM.rank != LAST:
            return u
        return u + torch.sqrt(0 * u) if self.backward else u * torch.nan


class SpoiltLate(Vectors):
    """The last rank's part of the right-hand side is spoilt from the third loss on; its layers talk to all others."""

    def __init__(self, mesh: Mesh, backward: bool) -> None:
        super().__init__(mesh)
        self.calls = 0
        self.function = self.model.func
        assert isinstance(self.function, nn.Module)
        self.function.add_module("first", Spoiler(backward))
        honest = self.function.forward
        self.function.forward = lambda t, u: honest(t, self.function.first(u))  # type: ignore[method-assign]

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.function.first.armed = self.calls >= 3
        return super().loss(model, batch)


@pytest.mark.parametrize("data", sorted({1, COMM.size}))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_all_ranks_end_alike_and_the_one_it_comes_from_is_named(data: int, backward: bool, directory: Path) -> None:
    with Mesh(data=data) as mesh:
        problem: Any = SpoiltLate(mesh, backward)
        with pytest.raises(DivergenceError) as ended:
            loop.train(problem, TRAINING, mesh, directory, SnapshotConfig(every_steps=1, every_minutes=0))
        text = str(ended.value)
        what = "the norm of the gradient is nan" if backward else "the loss is nan"
        assert text.startswith(f"step 3 (epoch 1): {what}: ")
        last = COMM.bcast(socket.gethostname(), root=LAST)
        assert f"; it comes from rank {LAST} ({last}), first seen in the " in text
        assert COMM.allgather(text) == [text] * COMM.size
        assert text.endswith("; the last snapshot is that of step 2")
        snapshot_files.check(snapshot_files.path_of(directory, 2))


@pytest.mark.parametrize("name", ["inner.weight", "rate"])
def test_a_parameter_that_one_rank_has_spoilt_is_not_kept(name: str, directory: Path) -> None:
    with Mesh() as mesh:
        problem: Any = Vectors(mesh)
        value = dict(problem.model.func.named_parameters())[name]
        steps = []

        def spoil(optimiser: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
            steps.append(optimiser)
            if len(steps) == 2 and mesh.rank == LAST:
                with torch.no_grad():
                    value.fill_(torch.inf)

        hook = register_optimizer_step_post_hook(spoil)
        try:
            with pytest.raises(DivergenceError, match=rf"^step 2: the parameter func\.{name} is not finite after it"):
                loop.train(problem, TRAINING, mesh, directory, SnapshotConfig(every_steps=1, every_minutes=0))
        finally:
            hook.remove()
        COMM.barrier()
        assert snapshot_files.steps_in(directory) == [1]
