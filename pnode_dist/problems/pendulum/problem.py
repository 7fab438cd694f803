"""The pendulum problem: learn the force on a point that a rod holds, through a DAE, and follow other motions."""

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
from pnode_dist.problems.pendulum.data import PendulumData, generate, partitions
from pnode_dist.problems.pendulum.model import ConstrainedMotion, PendulumModel, TrueForce, mass_matrix, right_hand_side
from pnode_dist.problems.pendulum.physics import COMPONENTS
from pnode_dist.report.picture import draw
from pnode_dist.verify.gradcheck import GradcheckCase

if TYPE_CHECKING:
    from pnode_dist.partition.batch import BatchPartition
    from pnode_dist.problems.pendulum.config import PendulumRun

FORECAST, REPORT = "forecast.h5", "report.png"


def build_pendulum(config: PendulumRun, mesh: Mesh, dtype: torch.dtype) -> PendulumProblem:
    """The configured pendulum problem with its data, its model computing in `dtype`. Collective on the world.

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
    check_budget(config, training, problem.interval, problem.window)
    data = generate(problem, training, validation, mesh)
    motion = right_hand_side(model.hidden, model.activation, data, config.run.seed, dtype)
    solve = neural_ode(config, motion, training, mass=mass_matrix())
    return PendulumProblem(config, mesh, data, PendulumModel(solve, data.times), dtype)


@dataclass(frozen=True)
class PendulumProblem:
    """Computed trajectories, a model of them, and how one is learnt and judged by the other.

    See `pnode_dist.train.problem.Problem`.
    """

    config: PendulumRun
    mesh: Mesh
    data: PendulumData
    model: PendulumModel
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The problem's name."""
        return "pendulum"

    @property
    def units(self) -> str:
        """Errors are normalised, without units."""
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
        """This rank's share of the mean square error over windows, leads and components, each in units of its standard
        deviation."""
        return mean_share(self._normalised(model(batch) - batch.targets).square(), batch.partition, self.mesh)

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Root mean square errors, normalised, of rollouts of the validation trajectories from their initial states:
        over all samples, and at each evaluated lead."""
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
        self.model.solve.partition = batch.partition
        return SolveCase(self.model.solve, self.model.consistent(batch), self.model.clock(len(batch.targets)))

    def gradcheck_case(self) -> GradcheckCase:
        """The training loss of the first and of the last window, as a function of their initial states."""
        window = self.config.problem.window
        batch = windows(self.data.training, (0, self.data.training.times - 1 - window), window, self.dtype)

        def loss(state: torch.Tensor) -> torch.Tensor:
            return self.loss(self.model, dataclasses.replace(batch, initial=state))

        return GradcheckCase(
            batch.initial.clone().requires_grad_(), loss, tuple(self.model.parameters()), self.partition
        )

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """The errors of the model and of simple forecasts at each lead, of the learnt force, and how far the rod's
        length drifts; writes `forecast.h5` and `report.png`.

        Every validation trajectory is followed from its initial state to its last sample. Errors are root mean squares
        over trajectories and components, each in units of its standard deviation. Persistence keeps the initial state;
        the training mean is one state; vacuum is the exact motion without air. `true_force` is what the same solver
        makes of the force that the trajectories were computed with: the error of its steps.
        """
        rollout, batch = self._rollout(model)
        truth = batch.targets
        simple = {
            "persistence": batch.initial.expand(truth.shape),
            "training_mean": self.data.mean.expand(truth.shape),
            "vacuum": self.data.vacuum.values[1:, None],
        }
        candidates = {"model": rollout, **simple, "true_force": self._with_true_force()}
        squares = {name: self._mean_squares(values, truth) for name, values in candidates.items()}
        rows = [
            {
                "lead": lead,
                "seconds": self.data.times[lead],
                **{name: math.sqrt(values[lead - 1].item()) for name, values in squares.items()},
            }
            for lead in self.config.evaluation.leads
        ]
        self._write(candidates, batch, run_directory / FORECAST)
        return {
            "problem": self.name,
            "forecasts": f"{batch.partition.global_shape[0]} held-out initial states, {self.data.times[-1]:g} s each",
            "rmse": rows,
            "all_leads": {name: math.sqrt(values.mean().item()) for name, values in squares.items()},
            "force": self._force_errors(truth),
            "drift": self._drift(rollout),
            "forecast": str(run_directory / FORECAST),
            "report": draw(run_directory / REPORT, _draw, self.mesh),
        }

    def _rollout(self, model: nn.Module) -> tuple[torch.Tensor, Windows]:
        """Rollouts `[lead, 1, trajectory_local, component]` of the validation trajectories, and what they are to be,
        both in float64."""
        held_out, leads = self.data.validation, self.data.validation.times - 1
        rollout = model(windows(held_out, (0,), leads, self.dtype)).detach().double()
        return rollout, windows(held_out, (0,), leads, torch.float64)

    def _with_true_force(self) -> torch.Tensor:
        """Rollouts of the validation trajectories with the force that they were computed with, in float64."""
        held_out, leads = self.data.validation, self.data.validation.times - 1
        motion = ConstrainedMotion(TrueForce(self.config.problem.parameters))
        solve = neural_ode(self.config, motion, held_out.partition, mass=mass_matrix())
        with torch.no_grad():
            rollout: torch.Tensor = PendulumModel(solve, self.data.times)(windows(held_out, (0,), leads, torch.float64))
        return rollout

    def _normalised(self, error: torch.Tensor) -> torch.Tensor:
        return error / self.data.deviation.to(error.dtype)

    def _mean_squares(self, rollout: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """The mean square error, normalised, of each lead `[lead]`. Collective on the state ranks."""
        squares = self._normalised(rollout - truth)[:, 0].square()
        return means(squares, self.data.validation.partition, self.mesh)

    def _force_errors(self, truth: torch.Tensor) -> dict[str, float]:
        """The root mean square of the learnt force less the true one over the validation states, in m/s^2 (the mass is
        1), and of the true drag, which is what there is to find beside gravity. Collective on the state ranks."""
        parameters = self.config.problem.parameters
        motion = self.model.solve.func
        assert isinstance(motion, ConstrainedMotion)
        learnt = motion.force(truth.to(self.dtype)).detach().double()
        true = TrueForce(parameters)(truth)
        drag = true - true.new_tensor([0.0, -parameters.gravity])
        squares = torch.stack([(learnt - true).square().sum(), drag.square().sum()])
        count = self.config.problem.validation * len(truth)
        error, size = (self.mesh.sum(squares, over="state") / count).sqrt().tolist()
        return {"error": error, "drag": size}

    def _drift(self, rollout: torch.Tensor) -> dict[str, float]:
        """The largest change of the rod's length, relative to it, and the largest speed along the rod in m/s.

        Collective on the world.
        """
        length = self.config.problem.length
        position, velocity = rollout[..., 0:2], rollout[..., 2:4]
        distance = position.norm(dim=-1)
        along = (position * velocity).sum(dim=-1) / distance
        zero = torch.zeros(1, dtype=torch.float64)
        largest = [torch.cat([value.abs().flatten(), zero]).max() for value in (distance / length - 1, along)]
        stretch, speed = self.mesh.max(torch.stack(largest)).tolist()
        return {"length": stretch, "radial_speed": speed}

    def _write(self, candidates: Mapping[str, torch.Tensor], batch: Windows, path: Path) -> None:
        def stored(values: torch.Tensor) -> torch.Tensor:
            return torch.cat([batch.initial[None], values])[:, 0]

        contents = EnsembleRollouts(
            stored(candidates["model"]),
            stored(batch.targets),
            np.array(self.data.times),
            COMPONENTS,
            self.data.deviation.numpy(),
            {name: stored(values) for name, values in candidates.items() if name != "model"},
        )
        write_ensemble(path, contents, batch.partition, self.mesh)


def _draw(path: Path) -> None:
    from pnode_dist.problems.pendulum.plots import draw_report

    draw_report(path, path.with_name(FORECAST), path.with_name("metrics.jsonl"))
