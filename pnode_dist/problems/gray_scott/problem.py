"""The Gray-Scott problem: learn how two species react and diffuse from computed trajectories, and forecast others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.distributed.gradients import share_of_mean
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.batches import check_replicas, shared
from pnode_dist.problems.common.solver import check_budget, neural_ode
from pnode_dist.problems.gray_scott.data import Trajectories, generate
from pnode_dist.problems.gray_scott.forecast_file import Rollouts, write_rollouts
from pnode_dist.problems.gray_scott.model import GrayScottModel, Windows, right_hand_side, windows
from pnode_dist.problems.gray_scott.physics import SPECIES
from pnode_dist.report.picture import draw
from pnode_dist.verify.gradcheck import GradcheckCase

if TYPE_CHECKING:
    from pnode_dist.problems.gray_scott.config import GrayScottRun

FORECAST, REPORT = "forecast.h5", "report.png"


def build_gray_scott(config: GrayScottRun, mesh: Mesh, dtype: torch.dtype) -> GrayScottProblem:
    """The configured Gray-Scott problem with its data, its model computing in `dtype`. Collective on the world.

    Raises `ConfigurationError` on all ranks for whatever the trajectories or the number of ranks do not allow.
    """
    problem, model = config.problem, config.model
    longest = max(config.evaluation.leads)
    if longest >= problem.times:
        raise ConfigurationError(
            f"[evaluation] leads = {list(config.evaluation.leads)}: must be at most {problem.times - 1}, one less than "
            "[problem] times, so that they lie in the validation trajectories"
        )
    check_replicas(config, mesh, problem.trajectories * (problem.times - problem.window))
    partition = _partition(config, mesh)
    check_budget(config, partition, problem.interval, problem.window)
    data = generate(problem, partition, mesh)
    tendency = right_hand_side(
        partition, model.channels, model.layers, dtype, model.activation, data.rate, config.run.seed
    )
    solve = neural_ode(config, tendency, partition)
    return GrayScottProblem(config, mesh, partition, data, GrayScottModel(solve, data.interval), dtype)


def _partition(config: GrayScottRun, mesh: Mesh) -> GridPartition:
    problem = config.problem
    try:
        return GridPartition(mesh, problem.shape, len(SPECIES), ("periodic", "periodic"), 1, problem.processes)
    except ConfigurationError as error:
        key = f"[mesh] state = {mesh.state_ranks}" if problem.processes is None else "[problem] processes"
        raise ConfigurationError(f"{key}: {error}") from None


@dataclass(frozen=True)
class GrayScottProblem:
    """Computed trajectories, a model of them, and how one is learnt and judged by the other.

    See `pnode_dist.train.problem.Problem`.
    """

    config: GrayScottRun
    mesh: Mesh
    partition: GridPartition
    data: Trajectories
    model: GrayScottModel
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The problem's name."""
        return "gray_scott"

    @property
    def units(self) -> str:
        """Concentrations have no units."""
        return ""

    def batches(self, epoch: int, done: int = 0) -> Iterator[Windows]:
        """This replica's training windows of an epoch, shuffled. No window is of a validation trajectory."""
        window = self.config.problem.window
        firsts = range(self.data.times - window)
        starts = [(trajectory, first) for trajectory in range(self.data.training) for first in firsts]
        for share in shared(starts, self.config, self.mesh, epoch, done):
            yield windows(self.data, share, window, self.dtype)

    def loss(self, model: nn.Module, batch: Windows) -> torch.Tensor:
        """This rank's share of the mean square error, normalised, over cells, windows, leads and species."""
        error: torch.Tensor = model(batch) - batch.targets
        leads, size = batch.targets.shape[:2]
        return share_of_mean(error.square().sum(), leads * size * math.prod(self.partition.global_shape), self.mesh)

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Root mean square errors of rollouts of the validation trajectories from their initial states: over all
        samples, and at each evaluated lead."""
        rollout, batch = self._rollout(model)
        squares = self._mean_squares(rollout, batch.targets)
        return {
            "validation_rmse": math.sqrt(squares.mean().item()),
            **{f"lead_{lead}": math.sqrt(squares[lead - 1].item()) for lead in self.config.evaluation.leads},
        }

    def solve_statistics(self) -> SolveStatistics:
        """The counts of the model's last call."""
        return self.model.solve.last_solve

    def solve_case(self) -> SolveCase:
        """The solve of the first training batch."""
        batch = next(self.batches(1))
        times = [number * self.data.interval for number in range(len(batch.targets) + 1)]
        return SolveCase(self.model.solve, batch.initial, times)

    def gradcheck_case(self) -> GradcheckCase:
        """The training loss of the first window, as a function of its initial state."""
        batch = windows(self.data, [(0, 0)], self.config.problem.window, self.dtype)

        def loss(state: torch.Tensor) -> torch.Tensor:
            return self.loss(self.model, dataclasses.replace(batch, initial=state))

        return GradcheckCase(
            batch.initial.clone().requires_grad_(), loss, tuple(self.model.parameters()), self.partition
        )

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """The errors of the model and of two simple forecasts at each lead; writes `forecast.h5` and `report.png`.

        Every validation trajectory is rolled out from its initial state to its last sample. Errors are root mean
        squares over validation trajectories, cells and species, of concentrations. Persistence keeps the initial
        state; the training mean is one number for each species, the mean over all training trajectories.
        """
        rollout, batch = self._rollout(model)
        forecasts = {
            "model": rollout,
            "persistence": batch.initial.expand_as(batch.targets),
            "training_mean": torch.zeros_like(batch.targets),
        }
        errors = {name: self._mean_squares(value, batch.targets).sqrt() for name, value in forecasts.items()}
        problem = self.config.problem
        samples = f"{problem.times} samples, {problem.interval:g} time units apart"
        rows = [
            {
                "lead": lead,
                "time": lead * problem.interval,
                **{name: error[lead - 1].item() for name, error in errors.items()},
            }
            for lead in self.config.evaluation.leads
        ]
        result = {
            "species": list(SPECIES),
            "grid": list(problem.shape),
            "training": f"{problem.trajectories} trajectories of {samples}",
            "validation": f"{problem.validation} trajectories of {samples}, from other initial states",
            "rmse": rows,
        }
        self._write(rollout, batch, run_directory / FORECAST)
        result["forecast"] = str(run_directory / FORECAST)
        return {**result, "report": draw(run_directory / REPORT, _draw, self.mesh)}

    def _rollout(self, model: nn.Module) -> tuple[torch.Tensor, Windows]:
        """Rollouts `[lead, trajectory, ny_local, nx_local, species]` of the validation trajectories, and what they are
        to be, both in float64."""
        starts = [(trajectory, 0) for trajectory in range(self.data.training, len(self.data.values))]
        leads, size = self.data.times - 1, self.config.training.batch_size
        parts = [
            model(windows(self.data, starts[begin : begin + size], leads, self.dtype)).detach().double()
            for begin in range(0, len(starts), size)
        ]
        return torch.cat(parts, dim=1), windows(self.data, starts, leads, torch.float64)

    def _mean_squares(self, rollout: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """The mean square error of each lead `[lead]`, of concentrations. Collective on the state ranks."""
        error = (rollout - truth) * self.data.deviation
        squares = self.mesh.sum(error.square().sum(dim=(1, 2, 3, 4)), over="state")
        return squares / (truth.shape[1] * math.prod(self.partition.global_shape))

    def _write(self, rollout: torch.Tensor, batch: Windows, path: Path) -> None:
        def stored(values: torch.Tensor) -> torch.Tensor:
            return self.data.physical(torch.cat([batch.initial[None], values])).transpose(0, 1)

        contents = Rollouts(
            stored(rollout),
            stored(batch.targets),
            self.data.mean,
            self.data.interval,
            self.config.problem.domain,
            SPECIES,
        )
        write_rollouts(path, contents, self.partition, self.mesh)


def _draw(path: Path) -> None:
    from pnode_dist.problems.gray_scott.plots import draw_report

    draw_report(path, path.with_name(FORECAST), path.with_name("metrics.jsonl"))
