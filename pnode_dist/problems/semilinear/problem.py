"""The semilinear problems: learn the convection of a stiff equation on a line from computed trajectories.

u_t = L u - F(u)_x with the stiff linear L known and implicit, and F a neural network and explicit, as in H. Zhang, Y.
Liu, R. Maulik: Semi-implicit neural ODEs, AAAI 2025. Which equation it is, `[problem] type` says.
"""

from __future__ import annotations

import dataclasses
import math
import time
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
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.planning import SolveCase
from pnode_dist.ode.rhs.split import SplitFunction
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.batches import check_replicas, shared
from pnode_dist.problems.common.solver import check_budget, neural_ode
from pnode_dist.problems.common.trajectories import Trajectories, Windows, windows
from pnode_dist.problems.semilinear.data import generate
from pnode_dist.problems.semilinear.equation import Convection, linear_stencil
from pnode_dist.problems.semilinear.forecast_file import Rollouts, write_rollouts
from pnode_dist.problems.semilinear.model import SemilinearModel, learnt_convection
from pnode_dist.problems.semilinear.periodic_line import line, operator, shortest_wave
from pnode_dist.problems.semilinear.stable_step import largest_stable_step
from pnode_dist.report.picture import draw
from pnode_dist.verify.gradcheck import GradcheckCase

if TYPE_CHECKING:
    from pnode_dist.problems.semilinear.config import SemilinearRun

FORECAST, REPORT = "forecast.h5", "report.png"
EXPLICIT = "euler"
"""Of the explicit methods the one with the fewest evaluations per unit of time where stability limits the step."""


def build_semilinear(config: SemilinearRun, mesh: Mesh, dtype: torch.dtype) -> SemilinearProblem:
    """The configured problem with its data, its model computing in `dtype`. Collective on the world.

    Raises `ConfigurationError` on all ranks for whatever the trajectories or the number of ranks do not allow.
    """
    problem = config.problem
    longest = max(config.evaluation.leads)
    if longest >= problem.times:
        raise ConfigurationError(
            f"[evaluation] leads = {list(config.evaluation.leads)}: must be at most {problem.times - 1}, one less than "
            "[problem] times, so that they lie in the validation trajectories"
        )
    check_replicas(config, mesh, problem.trajectories * (problem.times - problem.window))
    try:
        partition = line(mesh, problem.points, max(1, (config.model.kernel_size - 1) // 2))
    except ConfigurationError as error:
        raise ConfigurationError(f"[mesh] state = {mesh.state_ranks}: {error}") from None
    check_budget(config, partition, problem.interval, problem.window)
    data = generate(problem, partition, mesh)
    term = learnt_convection(partition, problem.length, data.scale, config.model, dtype, config.run.seed)
    return SemilinearProblem(config, mesh, partition, data, _model(config, partition, term), dtype)


def _model(config: SemilinearRun, partition: GridPartition, term: nn.Module) -> SemilinearModel:
    """The configured solve of the equation's linear part and `term`."""
    return SemilinearModel(
        term, lambda samples: neural_ode(config, _right_hand_side(config, partition, term, samples), partition)
    )


def _right_hand_side(config: SemilinearRun, partition: GridPartition, term: nn.Module, samples: int) -> SplitFunction:
    stencil = linear_stencil(config.problem.equation, config.problem.points)
    return SplitFunction(implicit=operator(partition, stencil, samples), explicit=term)


@dataclass(frozen=True)
class SemilinearProblem:
    """Computed trajectories, a model of them, and how one is learnt and judged by the other.

    See `pnode_dist.train.problem.Problem`.
    """

    config: SemilinearRun
    mesh: Mesh
    partition: GridPartition
    data: Trajectories
    model: SemilinearModel
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The problem's name."""
        return self.config.problem.type

    @property
    def units(self) -> str:
        """The equations are dimensionless."""
        return ""

    def batches(self, epoch: int, done: int = 0) -> Iterator[Windows]:
        """This replica's training windows of an epoch, shuffled. No window is of a validation trajectory."""
        window = self.config.problem.window
        for starts in shared(self.data.starts(window), self.config, self.mesh, epoch, done):
            yield windows(self.data, starts, window, self.dtype)

    def loss(self, model: nn.Module, batch: Windows) -> torch.Tensor:
        """This rank's share of the mean square error, in units of the data's scale, over points, windows and leads."""
        error: torch.Tensor = model(batch) - batch.targets
        leads, size = batch.targets.shape[:2]
        return share_of_mean(error.square().sum(), leads * size * self.partition.shape[0], self.mesh)

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Root mean square errors of rollouts of the validation trajectories from their first samples: over all
        samples, and at each evaluated lead."""
        batch = self._whole_trajectories()
        squares = self._mean_squares(model(batch), batch)
        return {
            "validation_rmse": math.sqrt(squares.mean().item()),
            **{f"lead_{lead}": math.sqrt(squares[lead - 1].item()) for lead in self.config.evaluation.leads},
        }

    def solve_statistics(self) -> SolveStatistics:
        """The counts of the model's last call."""
        return self.model.last_solve

    def solve_case(self) -> SolveCase:
        """The solve of the first training batch."""
        batch = next(self.batches(1))
        return SolveCase(self.model.solve(len(batch.starts)), batch.initial, batch.times)

    def gradcheck_case(self) -> GradcheckCase:
        """The training loss of the first window, as a function of its initial state."""
        batch = windows(self.data, [(0, 0)], self.config.problem.window, self.dtype)

        def loss(state: torch.Tensor) -> torch.Tensor:
            return self.loss(self.model, dataclasses.replace(batch, initial=state))

        return GradcheckCase(
            batch.initial.clone().requires_grad_(), loss, tuple(self.model.parameters()), self.partition
        )

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """The errors of the model and of other forecasts at each lead; writes `forecast.h5` and `report.png`.

        Every validation trajectory is rolled out from its first sample to its last. Errors are root mean squares over
        validation trajectories and points, in the units of the equation. `explicit` is the same model solved by an
        explicit method with the largest step that is stable; `equation` is the equation itself in place of the model,
        with the model's method and steps; persistence keeps the first sample.
        """
        batch = self._whole_trajectories()
        problem, count = self.config.problem, len(batch.starts)
        truth_term = Convection(self.partition, problem.equation.length, self.data.scale)
        step = self._largest_stable_step(batch)
        right_hand_side = _right_hand_side(self.config, self.partition, self.model.term, count)
        explicit = NeuralODE(right_hand_side, method=EXPLICIT, step_size=step, partition=self.partition)
        forecasts, costs = {}, []
        for name, solve in (
            ("model", self.model.solve(count)),
            ("explicit", explicit),
            ("equation", _model(self.config, self.partition, truth_term).solve(count)),
        ):
            began = time.perf_counter()
            forecasts[name] = solve(batch.initial, batch.times)[1:]
            costs.append(
                {
                    "rollout": name,
                    "method": solve.method,
                    "largest_step": step if name == "explicit" else solve.step_size,
                    "steps": solve.last_solve.forward_steps,
                    "seconds": self.mesh.max(torch.tensor(time.perf_counter() - began)).item(),
                }
            )
        forecasts["persistence"] = batch.initial.expand_as(batch.targets)
        errors = {name: self._mean_squares(value, batch).sqrt() for name, value in forecasts.items()}
        rows = [
            {
                "lead": lead,
                "time": lead * problem.interval,
                **{name: error[lead - 1].item() for name, error in errors.items()},
            }
            for lead in self.config.evaluation.leads
        ]
        samples = f"{problem.times} samples, {problem.interval:g} time units apart"
        result = {
            "points": problem.points,
            "length": problem.length,
            "deviation": self.data.scale,
            "training": f"{problem.trajectories} trajectories of {samples}",
            "validation": f"{problem.validation} trajectories of {samples}, from other initial states",
            "rmse": rows,
            "costs": costs,
        }
        self._write(forecasts, batch, run_directory / FORECAST)
        result["forecast"] = str(run_directory / FORECAST)
        return {**result, "report": draw(run_directory / REPORT, self._draw, self.mesh)}

    def _whole_trajectories(self) -> Windows:
        """The validation trajectories, from their first samples on."""
        starts = [(number, 0) for number in range(self.data.training, len(self.data.values))]
        return windows(self.data, starts, self.data.times - 1, self.dtype)

    def _largest_stable_step(self, batch: Windows) -> float:
        """That of the explicit method for the model, from the first of the trajectories on."""
        problem = self.config.problem
        func = _right_hand_side(self.config, self.partition, self.model.term, 2)
        guess = -1 / shortest_wave(linear_stencil(problem.equation, problem.points))
        return largest_stable_step(func, batch.initial[:1], EXPLICIT, self.partition, guess)

    def _mean_squares(self, rollout: torch.Tensor, batch: Windows) -> torch.Tensor:
        """The mean square error of each lead `[lead]`, in the units of the equation. Collective on the state ranks."""
        error = (rollout.detach().double() - batch.targets.double()) * self.data.scale
        squares = self.mesh.sum(error.square().sum(dim=(1, 2, 3)), over="state")
        return squares / (len(batch.starts) * self.partition.shape[0])

    def _write(self, forecasts: dict[str, torch.Tensor], batch: Windows, path: Path) -> None:
        def stored(values: torch.Tensor) -> torch.Tensor:
            whole = torch.cat([batch.initial[None], values.detach()])
            return whole[..., 0].transpose(0, 1).double() * self.data.scale

        trajectories = {"truth": stored(batch.targets), **{name: stored(value) for name, value in forecasts.items()}}
        contents = Rollouts(trajectories, self.data.interval, self.config.problem.length)
        write_rollouts(path, contents, self.partition, self.mesh)

    def _draw(self, path: Path) -> None:
        from pnode_dist.problems.semilinear.plots import draw_report

        draw_report(path, path.with_name(FORECAST), path.with_name("metrics.jsonl"), self.config.problem.equation.title)
