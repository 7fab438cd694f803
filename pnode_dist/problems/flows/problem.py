"""The flows problem: learn the density of samples by a continuous normalizing flow, and draw from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.gradients import share_of_mean
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition.batch import BatchPartition
from pnode_dist.partition.protocol import even_ranges
from pnode_dist.problems.common.batches import check_replicas, shared
from pnode_dist.problems.common.solver import check_checkpoint, neural_ode
from pnode_dist.problems.flows.config import PLANAR
from pnode_dist.problems.flows.data import FlowsData, Rows, load
from pnode_dist.problems.flows.evaluation import SpreadFlow, judge
from pnode_dist.problems.flows.model import ContinuousFlow, FlowDensity, FlowDynamics, Whitening, continuous_flow
from pnode_dist.problems.flows.sample_file import write_flow
from pnode_dist.report.picture import draw
from pnode_dist.verify.gradcheck import GradcheckCase

if TYPE_CHECKING:
    from pnode_dist.problems.flows.config import FlowsRun

FORECAST, REPORT = "forecast.h5", "report.png"
_NOISE, _BASE = 2, 3
_CHECKED = 64


def build_flows(config: FlowsRun, mesh: Mesh, dtype: torch.dtype) -> FlowsProblem:
    """The configured problem with its data, its model computing in `dtype`. Collective on the world.

    Raises `ConfigurationError` on all ranks for whatever the data or the number of ranks do not allow.
    """
    data = agreed(mesh, lambda: load(config.problem))
    rows = len(data.training)
    check_replicas(config, mesh, rows, "sample")

    # One object for each number of samples: by it the ranks know which of their solvers belong together, also where a
    # rank has as many of one number as of another, or a replica none.
    @cache
    def partition_of(count: int) -> BatchPartition:
        return BatchPartition(mesh, max(count, 1), (data.dimension,))

    partition = partition_of(math.ceil(min(config.training.batch_size, rows) / mesh.data_replicas))
    # The trajectories of all flows wait for the backward pass together.
    trajectory = config.trajectory.model_copy(update={"solves": config.trajectory.solves * config.model.flows})
    config = config.model_copy(update={"trajectory": trajectory})

    def solve(dynamics: FlowDynamics) -> NeuralODE:
        values = partition.local_shape[0] * (data.dimension + 1 + len(dynamics.charges))
        check_checkpoint(config, values, [0.0, config.model.time], partition.comm)
        return neural_ode(config, dynamics, partition, last_only=True)

    fitted = data.fitted
    whitening = (
        Whitening(torch.from_numpy(fitted.mean), torch.from_numpy(fitted.factor)) if config.model.whiten else None
    )
    model = continuous_flow(config.model, data.dimension, config.run.seed, dtype, solve, whitening)
    return FlowsProblem(config, mesh, data, SpreadFlow(model, mesh, partition_of, dtype), partition)


@dataclass(frozen=True)
class SampleBatch:
    """This rank's part of a replica's share of a batch.

    `samples` are `[sample_local, dimension]`, `noise` of the same shape is Hutchinson's, None for exact traces. `count`
    are the samples of the replica, and `partition` how they lie on its ranks.
    """

    samples: torch.Tensor
    noise: torch.Tensor | None
    count: int
    partition: BatchPartition


@dataclass(frozen=True)
class FlowsProblem:
    """Samples, a flow that is to have made them, and how one is learnt and judged by the other.

    See `pnode_dist.train.problem.Problem`. `partition` is that of a replica's share of a whole batch.
    """

    config: FlowsRun
    mesh: Mesh
    data: FlowsData
    spread: SpreadFlow
    partition: BatchPartition

    @property
    def name(self) -> str:
        """The problem's name."""
        return "flows"

    @property
    def model(self) -> ContinuousFlow:
        """The flow."""
        return self.spread.flow

    @property
    def units(self) -> str:
        """Log densities are natural logarithms."""
        return "nats"

    def batches(self, epoch: int, done: int = 0) -> Iterator[SampleBatch]:
        """This replica's shares of an epoch's shuffled batches, of which each state rank has a part.

        The noise is drawn for whole batches, and fixed by the run's seed, the epoch and the batch.
        """
        rows, size = len(self.data.training), self.config.training.batch_size
        for number, share in enumerate(shared(range(rows), self.config, self.mesh, epoch, done), done):
            drawn = self._noise((epoch, number), min(size, rows - number * size))
            noise = None if drawn is None else drawn[self.mesh.replica :: self.mesh.data_replicas]
            yield self._batch(np.array(share, dtype=np.int64), noise)

    def loss(self, model: nn.Module, batch: SampleBatch) -> torch.Tensor:
        """This rank's share of the mean negative log density in nats, with what the flow is charged for."""
        self.model.spread_over(batch.partition)
        density: FlowDensity = model(batch.samples, batch.noise)
        total = -density.log_density.sum()
        for name, charge in zip(self.model.charges, density.charges, strict=True):
            total = total + getattr(self.config.model, name) * charge.sum()
        return share_of_mean(total, batch.count, self.mesh)

    def validation(self, model: nn.Module) -> dict[str, float]:
        """The mean negative log density of the validation rows, in nats, with exact traces."""
        return {"validation_nll": -float(self.spread.log_density(self.data.validation).mean())}

    def solve_statistics(self) -> SolveStatistics:
        """The counts of the model's last call, all flows together."""
        return sum((solve.last_solve for solve in self._solves()), SolveStatistics())

    def solve_case(self) -> SolveCase:
        """The first flow's solve of the first training batch."""
        batch = next(self.batches(1))
        args = () if batch.noise is None else (batch.noise,)
        self.model.spread_over(batch.partition)
        return SolveCase(self._solves()[0], self.model.start(batch.samples), (0.0, self.model.time), args)

    def gradcheck_case(self) -> GradcheckCase:
        """The training loss of the first rows to learn from, as a function of them."""
        count = min(_CHECKED, len(self.data.training))
        batch = self._batch(np.arange(count), self._noise((0, 0), count))

        def loss(state: torch.Tensor) -> torch.Tensor:
            return self.loss(self.model, dataclasses.replace(batch, samples=state))

        return GradcheckCase(batch.samples.requires_grad_(), loss, tuple(self.model.parameters()), batch.partition)

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """The log-likelihood of the test rows, beside what is known of it, and samples; writes `forecast.h5` and
        `report.png`. See `pnode_dist.problems.flows.evaluation.judge`."""
        settings = self.config.evaluation
        base = np.random.default_rng([_BASE, self.config.run.seed]).normal(size=(settings.samples, self.data.dimension))
        cells = settings.cells if self.config.problem.density in PLANAR else None
        figures, contents = judge(self.spread, self.data, base, cells)
        result = {"problem": self.name, "density": self.config.problem.density, **figures}
        agreed(self.mesh, lambda: write_flow(run_directory / FORECAST, contents) if self.mesh.is_root else None)
        result["forecast"] = str(run_directory / FORECAST)
        return {**result, "report": draw(run_directory / REPORT, lambda path: _draw(path, result), self.mesh)}

    def _solves(self) -> list[NeuralODE]:
        return cast("list[NeuralODE]", list(self.model.solves))

    def _noise(self, key: tuple[int, int], count: int) -> Rows | None:
        """Hutchinson's noise for so many samples, as the run's seed and `key` fix it; None for exact traces."""
        settings = self.config.model
        if settings.trace == "exact":
            return None
        generator, shape = np.random.default_rng([_NOISE, self.config.run.seed, *key]), (count, self.data.dimension)
        if settings.noise == "gaussian":
            return generator.normal(size=shape)
        return 2.0 * generator.integers(0, 2, shape) - 1

    def _batch(self, rows: Rows, noise: Rows | None) -> SampleBatch:
        """This state rank's part of the rows of these numbers, and of the noise that goes with them."""
        own = slice(*even_ranges(len(rows), self.mesh.state_ranks)[self.mesh.state_rank])
        dtype = self.spread.dtype
        return SampleBatch(
            torch.from_numpy(self.data.training[rows[own]]).to(dtype),
            None if noise is None else torch.from_numpy(noise[own]).to(dtype),
            len(rows),
            self.spread.partition_of(len(rows)),
        )


def _draw(path: Path, figures: dict[str, Any]) -> None:
    from pnode_dist.problems.flows.plots import draw_report

    draw_report(path, path.with_name(FORECAST), path.with_name("metrics.jsonl"), figures)
