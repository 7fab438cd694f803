"""Flows problem: learn the density of samples by a continuous normalizing flow, and draw from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.gradients import share_of_mean
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition.batch import BatchPartition
from pnode_dist.partition.protocol import even_ranges
from pnode_dist.problems.common.batches import check_replicas, shared
from pnode_dist.problems.common.solver import check_checkpoint
from pnode_dist.problems.common.trainable import FORECAST, TrainableProblem
from pnode_dist.problems.flows.config import PLANAR
from pnode_dist.problems.flows.data import Rows, load
from pnode_dist.problems.flows.evaluation import DistributedFlow, evaluate_flow
from pnode_dist.problems.flows.model import ContinuousFlow, FlowDensity, FlowDynamics, Whitening, continuous_flow
from pnode_dist.report.dataset_file import write_dataset
from pnode_dist.verify.gradcheck import GradcheckCase

if TYPE_CHECKING:
    from pnode_dist.problems.flows.config import FlowsRun

_NOISE, _BASE = 2, 3
_CHECKED = 64


@dataclass(frozen=True)
class SampleBatch:
    """This rank's part of a replica's share of a batch.

    `samples` are `[sample_local, dimension]`. `noise` of the same shape is for Hutchinson's estimate, None for exact
    traces. `count` is the number of samples of the replica, and `partition` their distribution over its ranks.
    """

    samples: torch.Tensor
    noise: torch.Tensor | None
    count: int
    partition: BatchPartition


class FlowsProblem(TrainableProblem):
    """Learn the density of samples by a continuous normalizing flow."""

    config: FlowsRun
    plots = "pnode_dist.problems.flows.plots"
    units = "nats"

    def __init__(self, config: FlowsRun, mesh: Mesh, dtype: torch.dtype) -> None:
        # The trajectories of all flows are stored at the same time, until the backward pass.
        trajectory = config.trajectory.model_copy(update={"solves": config.trajectory.solves * config.model.flows})
        super().__init__(config.model_copy(update={"trajectory": trajectory}), mesh, dtype)
        self.data = agreed(mesh, lambda: load(config.problem))
        check_replicas(config, mesh, len(self.data.training), "sample")
        self._partitions: dict[int, BatchPartition] = {}
        fitted, whitening = self.data.fitted, None
        if config.model.whiten:
            whitening = Whitening(torch.from_numpy(fitted.mean), torch.from_numpy(fitted.factor))
        self._model = continuous_flow(config.model, self.data.dimension, config.run.seed, dtype, self._solve, whitening)
        self.spread = DistributedFlow(self._model, mesh, self.partition_of, dtype)

    def partition_of(self, count: int) -> BatchPartition:
        """Return the distribution of `count` samples, one object for each number. Collective on the state ranks.

        Solvers are cached by this object, so that ranks pair the same solvers. The local number of samples cannot serve
        as the key: it may be equal for two different totals, and a replica may have no samples.
        """
        if count not in self._partitions:
            self._partitions[count] = BatchPartition(self.mesh, max(count, 1), (self.data.dimension,))
        return self._partitions[count]

    @property
    def partition(self) -> BatchPartition:
        """Distribution of a replica's share of a whole batch."""
        size = min(self.config.training.batch_size, len(self.data.training))
        return self.partition_of(math.ceil(size / self.mesh.data_replicas))

    @property
    def model(self) -> ContinuousFlow:
        """Model of the problem, a flow."""
        return self._model

    def _solve(self, dynamics: FlowDynamics) -> NeuralODE:
        values = self.partition.local_shape[0] * (self.data.dimension + 1 + len(dynamics.charges))
        check_checkpoint(self.config, values, self.dtype, [0.0, self.config.model.time], self.partition.comm)
        return self.neural_ode(dynamics, self.partition, last_only=True)

    def batches(self, epoch: int, done: int = 0) -> Iterator[SampleBatch]:
        """Return this replica's shares of an epoch's shuffled batches, of which each state rank has a part.

        The noise is drawn for whole batches. The run's seed, the epoch and the batch determine it.
        """
        rows, size = len(self.data.training), self.config.training.batch_size
        for number, share in enumerate(shared(range(rows), self.config, self.mesh, epoch, done), done):
            drawn = self._noise((epoch, number), min(size, rows - number * size))
            noise = None if drawn is None else drawn[self.mesh.replica :: self.mesh.data_replicas]
            yield self._batch(np.array(share, dtype=np.int64), noise)

    def loss(self, model: nn.Module, batch: SampleBatch) -> torch.Tensor:
        """Return this rank's share of the mean negative log density in nats, with the weighted charges of the flow."""
        self.model.distribute_over(batch.partition)
        density: FlowDensity = model(batch.samples, batch.noise)
        total = -density.log_density.sum()
        for name, charge in zip(self.model.charges, density.charges, strict=True):
            total = total + getattr(self.config.model, name) * charge.sum()
        return share_of_mean(total, batch.count, self.mesh)

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Return the mean negative log density of the validation rows, in nats, with exact traces."""
        return {"validation_nll": -float(self.spread.log_density(self.data.validation).mean())}

    def solve_case(self) -> SolveCase:
        """Return the first flow's solve of the first training batch."""
        batch = next(self.batches(1))
        args = () if batch.noise is None else (batch.noise,)
        self.model.distribute_over(batch.partition)
        return SolveCase(
            cast("NeuralODE", self.model.solves[0]), self.model.start(batch.samples), (0.0, self.model.time), args
        )

    def gradcheck_case(self) -> GradcheckCase:
        """Return the training loss of the first training rows as a function of these rows."""
        count = min(_CHECKED, len(self.data.training))
        batch = self._batch(np.arange(count), self._noise((0, 0), count))

        def loss(state: torch.Tensor) -> torch.Tensor:
            return self.loss(self.model, dataclasses.replace(batch, samples=state))

        return GradcheckCase(batch.samples.requires_grad_(), loss, tuple(self.model.parameters()), batch.partition)

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """Return the log-likelihood of the test rows with references. Writes `forecast.h5` and `report.png`.

        See `pnode_dist.problems.flows.evaluation.evaluate_flow`.
        """
        settings = self.config.evaluation
        shape = (settings.samples, self.data.dimension)
        base = np.random.default_rng([_BASE, self.config.run.seed]).normal(size=shape)
        cells = settings.cells if self.config.problem.density in PLANAR else None
        figures, variables = evaluate_flow(self.spread, self.data, base, cells)
        write_dataset(run_directory / FORECAST, variables, self.mesh)
        result = {"problem": self.name, "density": self.config.problem.density, **figures}
        return self.illustrated(result, run_directory)

    def _noise(self, key: tuple[int, int], count: int) -> Rows | None:
        """Draw Hutchinson's noise from the run's seed and `key`, or return None for exact traces."""
        settings = self.config.model
        if settings.trace == "exact":
            return None
        generator, shape = np.random.default_rng([_NOISE, self.config.run.seed, *key]), (count, self.data.dimension)
        if settings.noise == "gaussian":
            return generator.normal(size=shape)
        return 2.0 * generator.integers(0, 2, shape) - 1

    def _batch(self, rows: Rows, noise: Rows | None) -> SampleBatch:
        """Return this state rank's part of the rows with these indices, and of their noise."""
        own = slice(*even_ranges(len(rows), self.mesh.state_ranks)[self.mesh.state_rank])
        return SampleBatch(
            torch.from_numpy(self.data.training[rows[own]]).to(self.dtype),
            None if noise is None else torch.from_numpy(noise[own]).to(self.dtype),
            len(rows),
            self.partition_of(len(rows)),
        )
