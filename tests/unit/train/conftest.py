"""A problem small enough to train in a test: fit the rate of exponential decay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import BatchPartition, Mesh, NeuralODE, Trajectory
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.config.tables import TrainingConfig
from pnode_dist.verify.gradcheck import GradcheckCase

SAMPLES, TRUE_RATE = 6, -0.7


class LinearRate(nn.Module):
    """du/dt = rate * u."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.2], dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.rate * u


class Decay:
    """Samples that decay at TRUE_RATE from time 0 to 1, each rank holding some of them."""

    name, units = "decay", "K"

    def __init__(self, mesh: Mesh, batches_per_epoch: int = 2, trajectory: Trajectory | None = None) -> None:
        self.mesh = mesh
        self.partition = BatchPartition(mesh, SAMPLES, (1,))
        self.model = NeuralODE(LinearRate(), step_size=0.25, partition=self.partition, trajectory=trajectory)
        self.batches_per_epoch = batches_per_epoch
        self.validations: list[float] = []

    def batches(self, epoch: int, done: int = 0) -> Iterator[torch.Tensor]:
        first, last = self.partition.owned
        for number in range(done, self.batches_per_epoch):
            yield torch.arange(1.0 + first, 1.0 + last, dtype=torch.float64)[:, None] + number

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        final = model(batch, torch.tensor([0.0, 1.0], dtype=torch.float64))[-1]
        truth = batch * torch.exp(torch.tensor(TRUE_RATE, dtype=torch.float64))
        return (final - truth).square().sum() / SAMPLES

    def validation(self, model: nn.Module) -> dict[str, float]:
        assert not torch.is_grad_enabled()
        error = abs(self.rate - TRUE_RATE)
        self.validations.append(error)
        return {"rate_error": error, "rate": self.rate}

    @property
    def rate(self) -> float:
        return float(self.model.func.rate.detach())

    def solve_statistics(self) -> SolveStatistics:
        return self.model.last_solve

    def gradcheck_case(self) -> GradcheckCase:
        state = next(self.batches(1)).requires_grad_()
        return GradcheckCase(state, lambda u: self.loss(self.model, u), list(self.model.parameters()), self.partition)

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        return {"rate": self.rate}


@pytest.fixture
def decay(mesh: Mesh) -> Decay:
    return Decay(mesh)


@pytest.fixture
def training() -> TrainingConfig:
    return TrainingConfig(epochs=4, learning_rate=0.05, dtype="float64")
