"""Semilinear problems: learn the convection of a stiff equation on a line from computed trajectories.

The equation is u_t = L u - F(u)_x. The stiff linear operator L is known and solved implicitly. F is a neural network
and solved explicitly, as in H. Zhang, Y. Liu, R. Maulik: Semi-implicit neural ODEs, AAAI 2025. `[problem] type` selects
the equation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.rhs.split import SplitFunction
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.computed_problem import ComputedProblem
from pnode_dist.problems.common.forecast_data import Samples, SplitData
from pnode_dist.problems.common.forecast_parts import Scaling
from pnode_dist.problems.common.trainable import FORECAST
from pnode_dist.problems.semilinear.data import generate
from pnode_dist.problems.semilinear.equation import Convection, linear_stencil
from pnode_dist.problems.semilinear.model import LearntConvection, SemilinearModel, learnt_convection
from pnode_dist.problems.semilinear.periodic_line import line, operator, shortest_wave
from pnode_dist.problems.semilinear.stable_step import largest_stable_step

if TYPE_CHECKING:
    from pnode_dist.problems.semilinear.config import SemilinearRun

EXPLICIT = "euler"
"""The explicit method with the fewest evaluations per unit of time where stability limits the step."""


class SemilinearProblem(ComputedProblem):
    """Learn the nonlinear part of a semilinear equation, with states in units of their root mean square."""

    config: SemilinearRun
    plots = "pnode_dist.problems.semilinear.plots"
    partition: GridPartition
    model: SemilinearModel
    model_variable = "model"

    def build_partition(self) -> GridPartition:
        """Partition the line into contiguous blocks. Collective on the state ranks."""
        try:
            return line(self.mesh, self.config.problem.points, max(1, (self.config.model.kernel_size - 1) // 2))
        except ConfigurationError as error:
            raise ConfigurationError(f"[mesh] state = {self.mesh.state_ranks}: {error}") from None

    def load_data(self) -> SplitData:
        """Compute all trajectories. Collective on the world."""
        problem = self.config.problem
        states = generate(problem, self.mesh)[..., None]
        places = np.arange(problem.points) * (problem.length / problem.points)
        learnt = problem.trajectories
        return self.split_data(states[:learnt], states[learnt:], dimensions=("x",), coordinates={"x": places})

    def build_scaling(self, learnt: Samples) -> Scaling:
        """Scale by the root mean square of the training trajectories."""
        # Computed from the whole states, so that it has the same bits at every number of ranks.
        return Scaling(torch.zeros(()), self.description.values.square().mean().sqrt())

    @property
    def scale(self) -> float:
        """The unit of the states in the solve."""
        scaling = self._parts.scaling
        assert scaling is not None
        return scaling.scale.item()

    def build_right_hand_side(self) -> LearntConvection:
        """Build the learnt term."""
        config = self.config
        length, seed = config.problem.length, config.run.seed
        return learnt_convection(self.partition, length, self.scale, config.model, self.dtype, seed)

    def build_model(self, func: nn.Module) -> SemilinearModel:
        """Build rollouts with the equation's linear part and the explicit term `func`."""
        return SemilinearModel(func, lambda count: self.neural_ode(self._split(func, count), self.partition))

    def _split(self, term: nn.Module, count: int) -> SplitFunction:
        """Combine the linear part and a term, for `count` states at once."""
        stencil = linear_stencil(self.config.problem.equation, self.config.problem.points)
        return SplitFunction(implicit=operator(self.partition, stencil, count), explicit=term)

    def solve_statistics(self) -> SolveStatistics:
        """Return the counts of the model's last call."""
        return self.model.last_solve

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """Compute the errors of the model and of other forecasts at each lead; write `forecast.h5` and `report.png`.

        `explicit` is the same model, solved by an explicit method with its largest stable step. `equation` replaces the
        model by the true equation, with the model's method and steps. `costs` compares their solves.
        """
        problem, term = self.config.problem, self.model.term
        batch = self.held_out_windows(torch.float64)
        step, count = self._largest_stable_step(batch.initial[:1].to(self.dtype)), len(batch.starts)

        def explicitly(count: int) -> NeuralODE:
            return NeuralODE(self._split(term, count), method=EXPLICIT, step_size=step, partition=self.partition)

        models = {
            "model": self.model,
            "explicit": SemilinearModel(term, explicitly),
            "equation": self.build_model(Convection(self.partition, problem.equation.length, self.scale)),
        }
        means, costs = {}, []
        names = (*models, "persistence")
        with self.create_file(run_directory / FORECAST, batch, names, self.variables(batch)) as file:
            for name, rollouts in models.items():
                solve = rollouts.solve_of(count)
                means[name], seconds = self.judged(name, rollouts, batch, [file.write], size=count)
                costs.append(
                    {
                        "rollout": name,
                        "method": solve.method,
                        "largest_step": step if name == "explicit" else solve.step_size,
                        "steps": solve.last_solve.forward_steps,
                        "seconds": self.mesh.max(torch.tensor(seconds)).item(),
                    }
                )
            means["persistence"] = self.judged("persistence", lambda lead: batch.initial, batch, [file.write]).means
            self.write_truth(batch, file)
        figures = {
            "equation": problem.equation.title,
            "points": problem.points,
            "length": problem.length,
            "deviation": self.scale,
            "costs": costs,
        }
        return self.illustrated(self.table(means, batch, figures), run_directory)

    def _largest_stable_step(self, initial: torch.Tensor) -> float:
        """Find the largest stable step of the explicit method for the model, from the first validation trajectory."""
        problem = self.config.problem
        guess = -1 / shortest_wave(linear_stencil(problem.equation, problem.points))
        func = self._split(self.model.term, 2)
        return largest_stable_step(func, initial, EXPLICIT, self.partition, guess)
