"""Pendulum problem: learn the force on a point held by a rod, through a DAE, and forecast other motions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.problems.common.computed_problem import EnsembleProblem
from pnode_dist.problems.common.forecast_data import SplitData, Windows
from pnode_dist.problems.pendulum.data import Motions, generate
from pnode_dist.problems.pendulum.model import ConstrainedMotion, PendulumModel, TrueForce, mass_matrix, right_hand_side
from pnode_dist.problems.pendulum.physics import COMPONENTS

if TYPE_CHECKING:
    from pnode_dist.problems.pendulum.config import PendulumRun


class PendulumProblem(EnsembleProblem):
    """Learn the force on a pendulum, through a differential-algebraic equation.

    Errors are in standard deviations of each component. Two more forecasts are compared: `vacuum` is the exact motion
    without air, and `true_force` is the same solver with the true force, which shows the error of its steps.
    """

    config: PendulumRun
    plots = "pnode_dist.problems.pendulum.plots"
    model: PendulumModel
    components = COMPONENTS

    @cached_property
    def motions(self) -> Motions:
        """All motions, computed on every rank."""
        return generate(self.config.problem, self.sample_times())

    def load_data(self) -> SplitData:
        """Return the training motions and the held-out motions."""
        units = ("m", "m", "m/s", "m/s", "N/m")
        return self.split_data(self.motions.training, self.motions.validation, units=units)

    def build_right_hand_side(self) -> ConstrainedMotion:
        """Build the equation of motion with the learnt force."""
        return right_hand_side(self.config.model, self.motions, self.config.run.seed)

    def build_solve(self, func: Any) -> NeuralODE:
        """Build the configured solve of the differential-algebraic equation."""
        return self.neural_ode(func, self.partition, mass=mass_matrix())

    def build_model(self, func: Any) -> PendulumModel:
        """Build rollouts that begin with consistent tensions."""
        return PendulumModel(self.build_solve(func))

    def baselines(self, batch: Windows) -> Mapping[str, torch.Tensor]:
        """Return the baseline forecasts, the motion without air, and the solve with the true force."""
        true = self.build_model(ConstrainedMotion(TrueForce(self.config.problem.parameters)))
        with torch.no_grad():
            true_force = true(batch)
        return {
            **super().baselines(batch),
            "vacuum": self.held_out_part(self.motions.vacuum),
            "true_force": true_force,
        }

    def figures(self, forecast: torch.Tensor, batch: Windows) -> dict[str, Any]:
        """Return the errors of the learnt force and the drift of the rod's length."""
        return {"force": self._force_errors(batch.targets), "drift": self._drift(forecast)}

    def lead_time(self, batch: Windows, lead: int) -> dict[str, float]:
        """Return the lead in seconds."""
        return {"seconds": batch.times[0][lead]}

    def _force_errors(self, truth: torch.Tensor) -> dict[str, float]:
        """Return the root mean square error of the learnt force and the root mean square of the true drag.

        Both are over the validation states, in m/s^2 (the mass is 1). The drag is the part of the force beside gravity.
        Collective on the state ranks.
        """
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
        """Return the largest relative change of the rod's length and the largest speed along the rod in m/s.

        Collective on the world.
        """
        position, velocity = rollout[..., 0:2], rollout[..., 2:4]
        distance = position.norm(dim=-1)
        along = (position * velocity).sum(dim=-1) / distance
        zero = torch.zeros(1, dtype=torch.float64)
        largest = [
            torch.cat([value.abs().flatten(), zero]).max()
            for value in (distance / self.config.problem.length - 1, along)
        ]
        longest, speed = self.mesh.max(torch.stack(largest)).tolist()
        return {"length": longest, "radial_speed": speed}
