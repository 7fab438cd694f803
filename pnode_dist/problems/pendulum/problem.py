"""Pendulum problem: learn the force on a point held by a rod, through a DAE, and forecast other motions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.problems.common.computed_problem import EnsembleProblem
from pnode_dist.problems.common.forecast_data import SplitData, Windows
from pnode_dist.problems.common.forecast_stream import Forecast, Row
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

    def baselines(self, batch: Windows) -> Mapping[str, Forecast]:
        """Return the baseline forecasts, the motion without air, and the solve with the true force."""
        true_force = self.build_model(ConstrainedMotion(TrueForce(self.config.problem.parameters)))
        true_force.evaluated_in = torch.float64
        return {
            **super().baselines(batch),
            "vacuum": self.held_out_part(self.motions.vacuum),
            "true_force": true_force,
        }

    def figures(self, batch: Windows) -> Mapping[str, Any]:
        """Return the errors of the learnt force and the drift of the rod's length."""
        return {"force": self._force_errors(batch), "drift": RodDrift(self.config.problem.length, self.mesh)}

    def lead_time(self, batch: Windows, lead: int) -> dict[str, float]:
        """Return the lead in seconds."""
        return {"seconds": batch.times[0][lead]}

    def _force_errors(self, batch: Windows) -> dict[str, float]:
        """Return the root mean square error of the learnt force and the root mean square of the true drag.

        Both are over the validation states, in m/s^2 (the mass is 1). The drag is the part of the force beside gravity.
        Collective on the state ranks.
        """
        parameters = self.config.problem.parameters
        motion = self.model.solve.func
        assert isinstance(motion, ConstrainedMotion)
        squares = torch.zeros(2, dtype=torch.float64)
        for lead in batch.leads:
            truth = batch.target(lead)
            learnt = motion.force(truth.to(self.dtype)).detach().double()
            true = TrueForce(parameters)(truth)
            drag = true - true.new_tensor([0.0, -parameters.gravity])
            squares += torch.stack([(learnt - true).square().sum(), drag.square().sum()])
        count = self.config.problem.validation * batch.steps
        error, size = (self.mesh.sum(squares, over="state") / count).sqrt().tolist()
        return {"error": error, "drag": size}


class RodDrift:
    """The largest relative change of the rod's length and the largest speed along the rod in m/s, of the model."""

    def __init__(self, length: float, mesh: Mesh) -> None:
        self._length, self._mesh = length, mesh
        self._largest = torch.zeros(2, dtype=torch.float64)

    def add(self, name: str, row: Row) -> None:
        """Take the states of the model at one lead."""
        if name != "model" or not row.states.numel():
            return
        position, velocity = row.states[..., 0:2], row.states[..., 2:4]
        distance = position.norm(dim=-1)
        along = (position * velocity).sum(dim=-1) / distance
        found = torch.stack([(distance / self._length - 1).abs().max(), along.abs().max()])
        self._largest = torch.maximum(self._largest, found)

    def result(self) -> dict[str, float]:
        """Return both. Collective on the world."""
        longest, speed = self._mesh.max(self._largest).tolist()
        return {"length": longest, "radial_speed": speed}
