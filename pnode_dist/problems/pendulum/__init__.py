"""A pendulum with friction."""

from __future__ import annotations

from pnode_dist.config.definition import ProblemDefinition
from pnode_dist.problems.pendulum.config import PendulumRun

PROBLEM = ProblemDefinition(
    PendulumRun,
    "pnode_dist.problems.pendulum.problem:PendulumProblem",
    "Learn the force on a pendulum, a differential-algebraic equation.",
)
