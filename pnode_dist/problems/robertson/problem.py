"""The Robertson problem: learn stiff reactions from trajectories over seven decades of time, and follow others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.planning import SolveCase
from pnode_dist.problems.common.batches import check_replicas, shared
from pnode_dist.problems.common.ensemble import Windows, mean_share, means, windows
from pnode_dist.problems.common.ensemble_file import EnsembleRollouts, write_ensemble
from pnode_dist.problems.common.solver import check_budget, neural_ode
from pnode_dist.problems.robertson.comparison import FINELY, RIVAL, Pursuit, pursuits_of
from pnode_dist.problems.robertson.data import RobertsonData, decades, generate, partitions
from pnode_dist.problems.robertson.model import RobertsonModel, right_hand_side
from pnode_dist.problems.robertson.physics import SPECIES
from pnode_dist.report.picture import draw
from pnode_dist.verify.gradcheck import GradcheckCase

if TYPE_CHECKING:
    from pnode_dist.partition.batch import BatchPartition
    from pnode_dist.problems.robertson.config import RobertsonRun

FORECAST, REPORT = "forecast.h5", "report.png"


def build_robertson(config: RobertsonRun, mesh: Mesh, dtype: torch.dtype) -> RobertsonProblem:
    """The configured Robertson problem with its data, its model computing in `dtype`. Collective on the world.

    Raises `ConfigurationError` on all ranks for whatever the trajectories or the number of ranks do not allow.
    """
    problem, model = config.problem, config.model
    longest = max(config.evaluation.leads)
    if longest >= problem.times:
        raise ConfigurationError(
            f"[evaluation] leads = {list(config.evaluation.leads)}: must be at most {problem.times - 1}, one less than "
            "[problem] times, so that they lie in the validation trajectories"
        )
    check_replicas(config, mesh, problem.times - problem.window)
    training, validation = partitions(problem, mesh)
    check_budget(config, training, decades(problem), problem.window)
    data = generate(problem, training, validation, mesh)
    rate = right_hand_side(model.hidden, model.activation, model.bias, data, config.run.seed, dtype)
    solve = neural_ode(config, rate, training)
    return RobertsonProblem(config, mesh, data, RobertsonModel(solve, data.times, data.decades), dtype)


@dataclass(frozen=True)
class RobertsonProblem:
    """Computed trajectories, a model of them, and how one is learnt and judged by the other.

    See `pnode_dist.train.problem.Problem`.
    """

    config: RobertsonRun
    mesh: Mesh
    data: RobertsonData
    model: RobertsonModel
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The problem's name."""
        return "robertson"

    @property
    def units(self) -> str:
        """Scaled concentrations have no units."""
        return ""

    @property
    def partition(self) -> BatchPartition:
        """How the training trajectories lie on the state ranks."""
        return self.data.training.partition

    def batches(self, epoch: int, done: int = 0) -> Iterator[Windows]:
        """This replica's training windows of an epoch, by shuffled starts, each of all training trajectories."""
        window = self.config.problem.window
        for starts in shared(range(self.data.training.times - window), self.config, self.mesh, epoch, done):
            yield windows(self.data.training, starts, window, self.dtype)

    def loss(self, model: nn.Module, batch: Windows) -> torch.Tensor:
        """This rank's share of the mean absolute error, scaled, over windows, leads and species."""
        return mean_share((model(batch) - batch.targets).abs(), batch.partition, self.mesh)

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Mean absolute errors, scaled, of rollouts of the validation trajectories from their first samples: over all
        later samples, and at each evaluated lead."""
        rollout, batch = self._rollout(model)
        errors = self._errors(rollout, batch.targets)
        return {
            "validation_mae": errors.mean().item(),
            **{f"lead_{lead}": errors[lead - 1].item() for lead in self.config.evaluation.leads},
        }

    def solve_statistics(self) -> SolveStatistics:
        """The counts of the model's last call."""
        return self.model.solve.last_solve

    def solve_case(self) -> SolveCase:
        """The solve of the first training batch."""
        batch = next(self.batches(1))
        self.model.solve.partition = batch.partition
        clock = self.model.clock(len(batch.targets))
        return SolveCase(self.model.solve, batch.initial, clock, (self.model.begin(batch),))

    def gradcheck_case(self) -> GradcheckCase:
        """The mean square error of the first and of the last training window, as a function of their initial states.

        Not the mean absolute error: finite differences would step over its kinks.
        """
        window = self.config.problem.window
        batch = windows(self.data.training, (0, self.data.training.times - 1 - window), window, self.dtype)

        def loss(state: torch.Tensor) -> torch.Tensor:
            error = self.model(dataclasses.replace(batch, initial=state)) - batch.targets
            return mean_share(error.square(), batch.partition, self.mesh)

        return GradcheckCase(
            batch.initial.clone().requires_grad_(), loss, tuple(self.model.parameters()), self.partition
        )

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """The errors of the model and of two simple forecasts, and what it costs to solve the model otherwise; writes
        `forecast.h5` and `report.png`.

        Every validation trajectory is followed from its first sample to its last. Errors are mean absolute errors of
        scaled concentrations. Persistence keeps the first sample; the training mean is that of the training
        trajectories at the same time. `solves` compares the solve that was trained with one of steps 16 times finer
        and with the rival, an explicit method with error control.
        """
        rollout, batch = self._rollout(model)
        truth = batch.targets
        simple = {
            "persistence": batch.initial.expand(truth.shape),
            "training_mean": self._training_mean().expand(truth.shape),
        }
        candidates = {"model": rollout, **simple}
        errors = {name: self._errors(values, truth) for name, values in candidates.items()}
        rows = [
            {
                "lead": lead,
                "time": self.data.times[lead],
                **{name: error[lead - 1].item() for name, error in errors.items()},
            }
            for lead in self.config.evaluation.leads
        ]
        pursuits = pursuits_of(self.config, self.model, batch, self.dtype)
        self._write(rollout, batch, simple, pursuits, run_directory / FORECAST)
        return {
            "problem": self.name,
            "forecasts": f"{self.data.validation.partition.global_shape[0]} held-out initial concentrations, "
            f"from t = {self.data.times[0]:g} to {self.data.times[-1]:g}",
            "mae": rows,
            "all_leads": {name: error.mean().item() for name, error in errors.items()},
            "all_leads_from_1_0_0": {name: self._first_error(values, truth) for name, values in candidates.items()},
            "solves": self._compared(pursuits, truth),
            "forecast": str(run_directory / FORECAST),
            "report": draw(run_directory / REPORT, _draw, self.mesh),
        }

    def _rollout(self, model: nn.Module) -> tuple[torch.Tensor, Windows]:
        """Rollouts `[lead, 1, trajectory_local, species]` of the validation trajectories, and what they are to be, both
        in float64."""
        held_out, leads = self.data.validation, self.data.validation.times - 1
        rollout = model(windows(held_out, (0,), leads, self.dtype)).detach().double()
        return rollout, windows(held_out, (0,), leads, torch.float64)

    def _errors(self, rollout: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """The mean absolute error, scaled, of the first leads `[lead]`. Collective on the state ranks."""
        errors = (rollout - truth[: len(rollout)]).abs()[:, 0]
        return means(errors, self.data.validation.partition, self.mesh)

    def _first_error(self, rollout: torch.Tensor, truth: torch.Tensor) -> float:
        """The mean absolute error, scaled, of the first validation trajectory. Collective on the state ranks."""
        own = 1 if self.data.validation.partition.owned[0] == 0 else 0
        first = (rollout - truth).abs()[:, 0, :own]
        return self.mesh.sum(first.sum(), over="state").item() / (len(truth) * len(SPECIES))

    def _training_mean(self) -> torch.Tensor:
        """The means `[lead, 1, 1, species]` over the training trajectories. Collective on the state ranks."""
        training = self.data.training
        total = self.mesh.sum(training.values[1:].sum(dim=1), over="state") / training.partition.global_shape[0]
        return total[:, None, None]

    def _compared(self, pursuits: Mapping[str, Pursuit], truth: torch.Tensor) -> list[dict[str, Any]]:
        """A row for each way to solve the trained model: its cost on this rank, where it stopped, how far it lies from
        the truth, and from the finely stepped solve. Collective on the state ranks."""
        fine = pursuits[FINELY].states[1:].double()
        rows = []
        for name, pursuit in pursuits.items():
            states, cost = pursuit.states[1:].double(), pursuit.cost
            found = pursuit.reached > 0
            rows.append(
                {
                    "solve": name,
                    "steps": cost.forward_steps,
                    "rejected": cost.rejected_steps,
                    "evaluations": cost.function_evaluations,
                    "newton_iterations": cost.newton_iterations,
                    "reached_time": self.data.times[pursuit.reached],
                    "mae": self._errors(states, truth).mean().item() if found else None,
                    "mae_to_fine_steps": self._errors(states, fine).mean().item() if found else None,
                    "stopped": pursuit.stopped,
                }
            )
        return rows

    def _write(
        self,
        rollout: torch.Tensor,
        batch: Windows,
        simple: Mapping[str, torch.Tensor],
        pursuits: Mapping[str, Pursuit],
        path: Path,
    ) -> None:
        def stored(values: torch.Tensor) -> torch.Tensor:
            missing = torch.full_like(batch.targets[len(values) :], math.nan)
            return self.data.physical(torch.cat([batch.initial[None], values.double(), missing])[:, 0])

        samples = len(self.data.times)
        contents = EnsembleRollouts(
            stored(rollout),
            stored(batch.targets),
            np.array(self.data.times),
            SPECIES,
            self.data.width.numpy(),
            {**{name: stored(values) for name, values in simple.items()}, RIVAL: stored(pursuits[RIVAL].states[1:])},
            {
                f"steps_{name}": np.array([*pursuit.steps, *[math.nan] * (samples - len(pursuit.steps))])
                for name, pursuit in pursuits.items()
            },
        )
        write_ensemble(path, contents, batch.partition, self.mesh)


def _draw(path: Path) -> None:
    from pnode_dist.problems.robertson.plots import draw_report

    draw_report(path, path.with_name(FORECAST), path.with_name("metrics.jsonl"))
